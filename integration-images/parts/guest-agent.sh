# guest-agent: QEMU's own agent (qemu-ga) with its libraries and loader, as an initramfs that is appended to the guest's; `qga` starts it there.

make_guest_agent() {
    local work=$2 tree=$2/tree root=$2/root libraries=lib/x86_64-linux-gnu file
    unpack guest-agent "$tree"
    mkdir -p "$root/bin" "$root/lib64" "$root/$libraries"
    cp "$tree/usr/sbin/qemu-ga" "$root/bin/qemu-ga"
    cp -L "$tree/lib64/ld-linux-x86-64.so.2" "$root/lib64/"
    while read -r file; do cp -L "$file" "$root/$libraries/"; done < <(libraries_of "$tree" "$root/bin/qemu-ga")
    cp "$here/guest/qga" "$root/bin/qga"
    chmod +x "$root/bin/qemu-ga" "$root/bin/qga"
    pack_initramfs "$root" "$images/kernel/busybox" "$work/guest-agent.cpio"
    rm -rf "$root" "$tree"
}

# libraries_of TREE PROGRAM: the files in TREE that the program is linked with.
libraries_of() {
    local tree=$1 program=$2 list
    list=$("$tree/lib64/ld-linux-x86-64.so.2" --library-path "$tree/lib/x86_64-linux-gnu:$tree/usr/lib/x86_64-linux-gnu" --list "$program") ||
        fail "$program does not run with the libraries of $tree (message above): look at the section guest-agent in $here/packages"
    ! grep -F 'not found' <<<"$list" >&2 || fail "$program lacks libraries (above): add their packages to the section guest-agent in $here/packages"
    sed -n 's/.* => \(.*\) (.*/\1/p' <<<"$list"
}
