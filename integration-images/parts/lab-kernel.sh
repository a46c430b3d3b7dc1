# lab-kernel: the kernel of the lab host with the modules that are of use there, and the initramfs that mounts its root.

make_lab_kernel() {
    local work=$2 from version
    unpack lab-kernel "$work/tree"
    mv "$work"/tree/boot/vmlinuz-* "$work/vmlinuz"
    take_vmlinux "$work/vmlinuz" "$work/vmlinux" zstd
    from=$(echo "$work"/tree/lib/modules/*)
    version=${from##*/}
    make_lab_initramfs "$work"
    mkdir -p "$work/modules/$version"
    mv "$from"/modules.{order,builtin*} "$work/modules/$version/"
    take_wanted "$from/kernel" "$work/modules/$version/kernel"
    take_needed "$from/kernel" "$work/modules/$version/kernel"
    rm -rf "$work/tree"
}

# take_wanted FROM TO: the modules that lab/modules names. They are decompressed: without KVM that takes longer than to read.
take_wanted() {
    local from=$1 to=$2 folder names
    while read -r folder names; do
        [[ $folder != "#" ]] || continue
        mkdir -p "$to/$folder"
        # shellcheck disable=SC2086 # patterns are meant
        (cd "$from/$folder" && mv $names "$to/$folder/") || fail "the lab's kernel lacks modules of $folder (message above): mend $here/lab/modules"
    done <"$here/lab/modules"
    decompress_modules "$to"
}

decompress_modules() { find "$1" -name '*.ko.xz' -print0 | xargs -0 -r -n 32 -P "$(nproc)" xz -d; }

# take_needed FROM TO: what the modules of TO depend on, in turn.
take_needed() {
    local from=$1 to=$2 name file missing=1
    local -A left=()
    while read -r file; do
        name=${file##*/} name=${name%.ko*}
        left[${name//-/_}]=$file
    done < <(cd "$from" && find . -name '*.ko*')
    while ((missing)); do
        missing=0
        while read -r name; do
            file=${left[${name//-/_}]:-}
            [[ -n $file ]] || continue
            mkdir -p "$to/${file%/*}"
            mv "$from/$file" "$to/$file"
            unset "left[${name//-/_}]"
            missing=1
        done < <(find "$to" -name '*.ko' -exec grep -zahs '^depends=.' {} + | tr '\0,' '\n\n' | sed 's/^depends=//' | sort -u)
        decompress_modules "$to"
    done
}

# What mounts the root, and is needed no longer then; configfs has to be there before anything mounts it.
lab_root_drivers=(virtio_blk crc32c_generic ext4 configfs)

make_lab_initramfs() {
    local work=$1 root=$1/root driver
    mkdir -p "$root"/{bin,modules,dev,sys,root}
    mv "$work/tree/bin/busybox" "$root/bin/busybox"
    for driver in "${lab_root_drivers[@]}"; do take_module "$work/tree" "$root/modules" order "$driver"; done
    cp "$here/lab/initramfs-init" "$root/init"
    chmod +x "$root/init"
    pack_initramfs "$root" "$root/bin/busybox" "$work/initramfs.cpio"
    rm -rf "$root"
}
