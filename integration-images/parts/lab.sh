# lab: the lab host as it is booted: its kernel, and a disk with user land, modules, init and agent.

# Fixed, so that nothing in the disk is random: two made of the same inputs differ in times alone.
lab_uuid=8c2f0a52-6d55-4f3b-9d0e-51b1a6c0f001

make_lab() {
    local work=$2 tree=$2/tree tools=$images/lab-root/tree as_root=() mib
    cp -al "$tools" "$tree"
    cp -al "$images/lab-kernel/modules" "$tree/usr/lib/modules"
    in_tree "$tools" usr/sbin/depmod -b "$tree" "$(basename "$tree"/usr/lib/modules/*)" || fail "depmod of the lab's packages failed (message above): look at it there"
    install -m 755 "$here/lab/init" "$here/lab/poweroff" "$tree/usr/sbin/"
    install -m 644 "$here/lab/fstab" "$tree/etc/fstab"
    install -m 755 "$images/agent/agent" "$tree/usr/bin/agent"

    mib=$(du -s --apparent-size -m "$tree" | cut -f1)
    truncate -s $((mib * 9 / 8 + 512))M "$work/root.ext4"
    # Where this user is not root, in_tree runs mke2fs in a namespace that shows the files as root's.
    ((EUID == 0)) || ! unshare --map-root-user true 2>/dev/null || as_root=(unshare --map-root-user)
    # Nothing outlives a boot, so there is no journal; all is root's, so nothing is kept back for it.
    E2FSPROGS_FAKE_TIME=1 in_tree "$tools" usr/sbin/mke2fs -q -F -t ext4 -d "$tree" -m 0 -O ^has_journal,^resize_inode -U "$lab_uuid" \
        -E "hash_seed=$lab_uuid,root_owner=0:0,lazy_itable_init=1,nodiscard" "$work/root.ext4" >&2 || fail "mke2fs could not make the lab's disk (message above)"
    rm -rf "$tree"
    ln -s ../lab-kernel/{vmlinux,vmlinuz,initramfs.cpio} "$work/"
}
