# kernel: the guest's kernel, busybox, and of the kernel's modules those named in `drivers` with what they depend on.

# Before the colon what the console needs.
drivers=(virtio_pci virtio_console : virtio_blk virtio_scsi sd_mod sr_mod isofs virtio_net evdev button crc32c_generic ext4)
# What a guest in the lab may be given beside that: loaded only if init is told so, since each takes its time.
hardware_drivers=(igb igbvf e1000e xhci_pci ehci_pci uhci_hcd usb_storage uas nvme)

make_kernel() {
    local work=$2 list=console.order driver
    unpack kernel "$work/tree"
    mv "$work"/tree/boot/vmlinuz-* "$work/vmlinuz"
    take_vmlinux "$work/vmlinuz" "$work/vmlinux" xz
    mv "$work/tree/bin/busybox" "$work/busybox"
    mkdir "$work/modules"
    for driver in "${drivers[@]}"; do
        if [[ $driver == : ]]; then cp "$work/modules/console.order" "$work/modules/all.order"; list=all.order; continue; fi
        take_module "$work/tree" "$work/modules" "$list" "$driver"
    done
    for driver in "${hardware_drivers[@]}"; do take_module "$work/tree" "$work/modules" hardware.order "$driver"; done
    rm -rf "$work/tree"
}
