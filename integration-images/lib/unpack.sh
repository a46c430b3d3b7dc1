# How packages become trees, and kernels become what QEMU boots. Sourced, not run; every part is made with it.

# unpack PART FOLDER: the part's packages, downloaded before, into FOLDER.
unpack() {
    local part=$1 folder=$2 name path
    mkdir -p "$folder"
    while read -r name _ _ path _; do
        # Not dpkg-deb -x: where bin is a link to usr/bin, it would put a folder in the link's place.
        dpkg-deb --fsys-tarfile "$downloads/${path##*/}" | tar -x -C "$folder" --keep-directory-symlink || fail "$name of the part $part could not be unpacked into $folder (message above)"
    done < <(packages_of "$part")
}

# in_tree TREE PROGRAM [ARGUMENT...]: a program of an unpacked tree, with the tree's libraries and this system's loader.
in_tree() {
    local tree=$1 program=$2
    shift 2
    LD_LIBRARY_PATH=$tree/usr/lib/x86_64-linux-gnu:$tree/lib/x86_64-linux-gnu ${as_root[@]+"${as_root[@]}"} "$tree/$program" "$@"
}

# take_vmlinux VMLINUZ VMLINUX DECOMPRESSOR...: the ELF image in a kernel image. QEMU boots it as it is (PVH), so the guest, slow as it is
# without KVM, needs not decompress it: it is up in half the time. The fields are those of the kernel's Documentation/arch/x86/boot.rst.
take_vmlinux() {
    local image=$1 vmlinux=$2 setup_sectors offset length
    shift 2
    setup_sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$image")
    offset=$(od -An -tu4 -j $((0x248)) -N 4 "$image")
    length=$(od -An -tu4 -j $((0x24c)) -N 4 "$image")
    # After the compressed data stand four bytes with the size of what it holds.
    tail -c +$(((setup_sectors + 1) * 512 + offset + 1)) "$image" | head -c $((length - 4)) | "$@" -dc >"$vmlinux" || true
    [[ $(head -c 4 "$vmlinux") == $'\x7fELF' ]] ||
        fail "no ELF image was found in Debian's $image by $*: its compression may have changed; adapt who calls take_vmlinux in $here/parts"
}

# take_module TREE MODULES LIST NAME: the module's file, decompressed, from TREE to the folder MODULES, and its name to LIST in there, after
# all that it depends on.
take_module() {
    local tree=$1 modules=$2 list=$3 name=$4 file needs need
    [[ ! -f $modules/$name.ko ]] || return 0
    # A file's name has a dash where the module's has an underscore, or not.
    file=$(find "$tree/lib/modules" -name "${name//_/[-_]}.ko*" -print -quit)
    [[ -n $file ]] || fail "Debian's kernel in $tree has no module $name: it may be built in now; take it out of the lists in $here/parts"
    if [[ $file == *.xz ]]; then xz -dc "$file"; else cat "$file"; fi >"$modules/.$name.ko"
    needs=$(tr '\0' '\n' <"$modules/.$name.ko" | sed -n 's/^depends=//p' | head -1)
    for need in ${needs//,/ }; do take_module "$tree" "$modules" "$list" "${need//-/_}"; done
    mv "$modules/.$name.ko" "$modules/$name.ko"
    printf '%s.ko\n' "$name" >>"$modules/$list"
}

# pack_initramfs ROOT BUSYBOX FILE: not compressed, since an emulated processor takes longer to decompress it than to read it.
pack_initramfs() {
    (cd "$1" && find . -print | LC_ALL=C sort | "$2" cpio -o -H newc -R 0:0 2>/dev/null) >"$3" ||
        fail "the initramfs could not be packed into $3: look at the messages above"
}
