# initramfs: the guest's user land; and the folder guest, in which tests find all that a guest boots.

make_initramfs() {
    local work=$2 root=$2/root name
    mkdir -p "$root/bin" "$root/modules"
    cp "$images/kernel/busybox" "$root/bin/busybox"
    cp "$images"/kernel/modules/* "$root/modules/"
    cp "$here/guest/init" "$root/init"
    cp "$images/agent/agent" "$root/bin/agent"
    for name in inventory pattern unplug; do ln -s agent "$root/bin/$name"; done
    chmod +x "$root/init" "$root/bin/busybox" "$root/bin/agent"
    pack_initramfs "$root" "$images/kernel/busybox" "$work/initramfs.cpio"
    rm -rf "$root"
    mkdir -p "$images/guest"
    ln -sfn ../kernel/vmlinuz "$images/guest/vmlinuz"
    ln -sfn ../kernel/vmlinux "$images/guest/vmlinux"
    ln -sfn ../initramfs/initramfs.cpio "$images/guest/initramfs.cpio"
}
