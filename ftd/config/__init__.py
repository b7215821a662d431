"""The configuration file: what each setting means, costs and defaults to, and which combinations are refused.

`load(path)` returns a `Config` or raises ConfigError with one line for each problem:

    FILE: [section] key = VALUE: what is wrong; what would be right

Only what can be told from the file alone is checked by `load`, so that a configuration can be checked on any
machine. Files and devices that it names are looked for by `check_files` and by those who use them.
"""

from ftd.config.fields import MIB
from ftd.config.file import Config, check_files, load
from ftd.config.machine import Disk, Machine, Nic
from ftd.config.pair import Arbiter

__all__ = ["MIB", "Arbiter", "Config", "Disk", "Machine", "Nic", "check_files", "load"]
