"""A configuration that is complete and small: of node a, or of node b, as text and as a file."""

from pathlib import Path

NO_ARBITER = "accept_split_brain = true"
FILE_ARBITER = """kind = "file"
pair = "web"
folder = "records\""""

_OWN = {"a": "10.0.0.1", "b": "10.0.0.2"}
_PEER = {"a": "10.0.0.2", "b": "10.0.0.1"}


def text(
    node: str = "a", role: str = "primary", *, own: str = "", arbiter: str = NO_ARBITER, more: str = ""
) -> str:
    """own: more lines for [node]; more: more sections."""
    return f"""
[node]
name = "{node}"
role = "{role}"
{own + chr(10) if own else ""}[link]
listen = "{_OWN[node]}"
peer = "{_PEER[node]}"
insecure = true
[arbiter]
{arbiter}
{more}"""


def write(folder: Path, node: str = "a", role: str = "primary", **more: str) -> Path:
    """Write it to a file; the keywords are those of `text`."""
    path = folder / f"{node}.toml"
    path.write_text(text(node, role, **more))
    return path
