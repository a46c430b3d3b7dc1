# qemu-7.2, qemu-10.0: a QEMU with its libraries, modules and firmware, unpacked beside the system's and each other.

make_qemu() {
    local part=$1 work=$2 program lib=$images/$1/tree/usr/lib/x86_64-linux-gnu share=$images/$1/tree/usr/share options version
    unpack "$part" "$work/tree"
    rm -rf "$work"/tree/usr/share/{doc,man,locale,lintian}
    for program in qemu-system-x86_64 qemu-img qemu-io qemu-storage-daemon; do
        # QEMU 10.0 is built to look for firmware and modules in the system's folders, where another QEMU may live, and it aborts on a
        # module of another build. Firmware is a matter of -L; of module folders one more can be given, but the built-in one is not
        # forgotten: it is overwritten, by a path of the same length where nothing is.
        LC_ALL=C sed -i 's#/usr/lib/x86_64-linux-gnu/qemu\x00#/nonexistent/x86_64-linux/qemu\x00#g' "$work/tree/usr/bin/$program"
        options=""
        [[ $program != qemu-system-* ]] || options=" -L \"$share/qemu\" -L \"$share/seabios\" -L \"$images/$part/tree/usr/lib/ipxe/qemu\""
        printf '#!/bin/sh\nexport LD_LIBRARY_PATH="%s" QEMU_MODULE_DIR="%s"\nexec "%s"%s "$@"\n' \
            "$lib:$images/$part/tree/lib/x86_64-linux-gnu" "$lib/qemu" "$images/$part/tree/usr/bin/$program" "$options" >"$work/$program"
        chmod +x "$work/$program"
    done
    version=$(in_tree "$work/tree" usr/bin/qemu-system-x86_64 --version) ||
        fail "the unpacked $part does not run (message above): its libraries and this system's do not fit; run this on Debian 12"
    [[ $version == *"version ${part#qemu-}."* ]] || fail "$part was expected, its packages hold $version: look at the section of $part in $here/packages"
}
