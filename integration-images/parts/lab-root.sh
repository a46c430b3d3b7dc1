# lab-root: the lab host's user land as a tree: Debian's packages, unpacked but not configured. What their configuring would have done, and
# is needed, is done here.

make_lab_root() {
    local work=$2 tree=$2/tree folder program
    mkdir -p "$tree"/{dev,etc,proc,sys,run,tmp,root,mnt,srv,home,usr/{bin,sbin,lib,lib64},etc/{modprobe.d,target,openvswitch},var/{tmp,lib/openvswitch,log/openvswitch}}
    for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$tree/$folder"; done
    # Relative, so that nothing that is unpacked can leave the tree.
    ln -s ../run "$tree/var/run"
    unpack lab-root "$tree"
    rm -rf "$tree"/usr/share/{doc,doc-base,info,man,locale,lintian,bug,bash-completion,i18n,zsh,perl5,openvswitch/python} "$tree"/usr/lib/{systemd/system,x86_64-linux-gnu/gconv} \
        "$tree"/etc/{init.d,default,cron*,pam.d,logrotate.d,security}
    cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
    cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
    # udev's rules name these groups, which its configuring would have made.
    printf '%s\n' input:x:101: sgx:x:102: kvm:x:103: render:x:104: >>"$tree/etc/group"
    printf 'lab\n' >"$tree/etc/hostname"
    printf '127.0.0.1 localhost lab\n::1 localhost\n' >"$tree/etc/hosts"
    printf 'passwd: files\ngroup: files\nhosts: files\n' >"$tree/etc/nsswitch.conf"
    : >"$tree/etc/resolv.conf"
    printf 'export PS1="lab:\\w# "\n' >"$tree/root/.profile"
    # What update-alternatives would have linked.
    ln -s mawk "$tree/usr/bin/awk"
    ln -s vim.tiny "$tree/usr/bin/vi"
    ln -s less "$tree/usr/bin/pager"
    ln -s ../lib/openvswitch-switch/ovs-vswitchd "$tree/usr/sbin/ovs-vswitchd"
    ln -sf dash "$tree/usr/bin/sh"
    # Debian's are absolute, and would lead out of the tree when this machine runs the tree's depmod.
    for program in depmod insmod lsmod modinfo modprobe rmmod; do ln -sf ../bin/kmod "$tree/usr/sbin/$program"; done
    ln -s ../proc/self/mounts "$tree/etc/mtab"
    check_libraries "$tree"
}

# check_libraries TREE: all programs find their libraries in the tree, whatever `packages` leaves out of it.
check_libraries() {
    local tree=$1 libraries=$1/usr/lib/x86_64-linux-gnu lacking
    lacking=$(find "$tree"/usr/{bin,sbin,lib/udev,lib/openvswitch-switch} -type f -perm -u+x -size +1k \
        -exec sh -c 'head -c 4 "$1" | grep -q ELF && "$0/ld-linux-x86-64.so.2" --library-path "$0" --list "$1" 2>&1 | sed -n "s#^#$(basename "$1"): #; /not found/p"' \
        "$libraries" {} \;)
    [[ -z $lacking ]] || fail "programs of the lab lack libraries, so look at what $here/packages leaves out of lab-root:"$'\n'"$lacking"
}
