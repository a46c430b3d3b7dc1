# What every script here begins with: where things are, how it speaks, and room on the disk. Sourced, not run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
images=$(dirname "$here")/target/images
lock_file=$here/packages.lock
requirements=$here/requirements.lock
# With less than this a disk is called full.
full_mib=4

say() { printf 'images: %s\n' "$*" >&2; }

# A full disk makes tools fail in words of their own; so whatever failed, it is said.
fail() {
    printf 'images: error: %s\n' "$*" >&2
    local free; free=$(free_mib)
    ((free >= full_mib)) || printf 'images: error: the disk of %s is full (%s MiB free), which is most likely why: free some space, or make target a link to a bigger disk\n' "$images" "$free" >&2
    exit 1
}

# free_mib: what this user may still write below target/images, which may not exist yet.
free_mib() {
    local folder=$images
    until [[ -d $folder ]]; do folder=$(dirname "$folder"); done
    df --output=avail -BM "$folder" | tail -1 | tr -dc 0-9
}

# check_host: what is asked of this machine; the few programs that may be missing are installed if this is root.
check_host() {
    command -v apt-get dpkg-deb >/dev/null ||
        fail "apt-get and dpkg-deb are missing, so this is not Debian; the images are made of Debian 12 packages: run this on Debian 12"
    local arch; arch=$(dpkg --print-architecture)
    [[ $arch == amd64 ]] || fail "this machine's architecture is $arch; the test images exist for amd64 only: run the tests on such a machine"

    command -v cargo >/dev/null || fail "there is no cargo in the PATH, which builds the agent of the images: install Rust as README.md says, then run this again"

    local missing=()
    command -v xz >/dev/null || missing+=(xz-utils)
    # Without its static library no static program is linked.
    [[ -f /usr/lib/x86_64-linux-gnu/libc.a ]] || missing+=(libc6-dev)
    # The module `venv` alone proves nothing: Debian packs the pip that it installs separately.
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || fail "missing host tools; run as root: apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >&2 ||
        fail "apt-get could not install ${missing[*]} (its message is above): install them by hand, then run this again"
}

# one_at_a_time: waits until no other run works on the images; until this one ends, others wait.
one_at_a_time() {
    mkdir -p "$images" || fail "$images cannot be made (message above): look at who owns target"
    exec 9>"$images/.lock"
    flock -n 9 && return
    say "another run works on the images; waiting for it"
    flock -w 3600 9 || fail "another run has worked on $images for an hour: look at it (fuser $images/.lock), then run this again"
}
