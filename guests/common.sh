# Shared by the build scripts of the guests; sourced, not run.

# One line that says what is wrong, then stop.
fail() {
    echo "$(basename "$(dirname "$0")")/build: $*" >&2
    exit 1
}

say() {
    echo "$*" >&2
}

# need TOOL PACKAGE: the tool must be there, or say which Debian package has it.
need() {
    command -v "$1" >/dev/null || fail "$1 is missing; install the Debian package $2"
}

# need_gcc WHAT FLAGS...: compiles and links an empty program, because a compiler
# without headers or libraries is there, and yet of no use.
need_gcc() {
    local what=$1
    shift
    need gcc gcc
    echo 'int main(void) { return 0; }' |
        gcc "$@" -x c -o /dev/null - 2>/dev/null || fail "gcc cannot build $what; install the Debian packages gcc and libc6-dev"
}

guests_cache() {
    echo "${FTD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ftd}/guests"
}

# hash_of TEXT FILE...: 16 hex digits over a text, and the names and contents of files.
hash_of() {
    local text=$1 file
    shift
    {
        echo "$text"
        for file in "$@"; do
            basename "$file"
            cat "$file"
        done
    } | sha256sum | cut -c1-16
}

# publish WORK TARGET LINK: a finished folder appears under its name at once or not
# at all, even when two builds run side by side; LINK then points to the newest.
publish() {
    local work=$1 target=$2
    chmod 755 "$work"
    if [ ! -d "$target" ]; then
        mv -T "$work" "$target" 2>/dev/null || [ -d "$target" ] || fail "cannot create $target"
    fi
    point "$target" "$3"
}

point() {
    local temporary="$2.$$"
    ln -sfn "$(basename "$1")" "$temporary"
    mv -Tf "$temporary" "$2"
}

# ---- Debian packages, fetched as the machine's apt is configured, and not installed ----
# Before any of these: $work is a folder of the build's own.

apt_options=()
if [ "$(id -u)" = 0 ]; then
    # The private folder cannot be entered by the user that apt would change to.
    apt_options=(-o APT::Sandbox::User=root)
fi

# Package lists of our own, fetched from the sources this machine is configured with.
refresh_lists() {
    say "fetching package lists"
    mkdir -p "$work/apt/lists/partial"
    apt_options+=(-o "Dir::State::lists=$work/apt/lists"
                  -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=")
    apt-get -q "${apt_options[@]}" update >&2
}

# with_version PACKAGE...: prints "package=version" of each, or fails when one cannot be had.
with_version() {
    # One call for all of them, since each takes a second. A package that is not known has no lines.
    apt-cache "${apt_options[@]}" policy "$@" | awk -v wanted=$# '
        /^[^ ].*:$/ { package = substr($1, 1, length($1) - 1) }
        /^ *Candidate: / && $2 != "(none)" { print package "=" $2; found++ }
        END { exit found != wanted }'
}

# download PACKAGE=VERSION...: their .deb files, into $work.
download() {
    say "downloading $*"
    _download() {
        (cd "$work" && apt-get -q "${apt_options[@]}" download "$@" >&2)
    }
    _download "$@" || { refresh_lists && _download "$@"; } || fail "cannot download $*; try again after apt-get update"
}

# archive FOLDER: prints it as an initramfs, the same one for the same files.
archive() {
    (cd "$1" && find . -exec touch -h -d @0 {} + && find . | LC_ALL=C sort |
        cpio --quiet --reproducible -R 0:0 -o -H newc)
}
