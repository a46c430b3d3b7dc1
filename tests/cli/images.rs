//! Images that somebody else uses: another VM of qvirt, which the lease names, or any process, which QEMU's own lock stops and qvirt names.

use std::process::{Child, Command, Stdio};

use tests::qemu::images;
use tests::vm::{Output, Vm, finished};

use crate::scene::{QEMU, bare, edit, file, is_refusal, said, start_paused};

/// A process of this test; it ends with it.
struct Outsider(Child);

impl Outsider {
    /// A QEMU that was started by hand, with an image plugged into its machine.
    fn qemu(image: &str) -> Outsider {
        let mut command = Command::new(images().qemu(QEMU));
        command.args(["-M", "q35", "-nodefaults", "-display", "none", "-S", "-blockdev"]);
        command
            .arg(format!("driver=file,node-name=f,filename={image}"))
            .args(["-device", "virtio-blk,drive=f"]);
        Outsider::start(command, image)
    }

    /// A storage daemon that exports an image for writing, as qemu-nbd does.
    fn daemon(image: &str) -> Outsider {
        let mut command = Command::new(images().qemu_storage_daemon(QEMU));
        command.arg("--blockdev").arg(format!("driver=file,node-name=f,filename={image}")).arg("--export");
        command.arg(format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={image}.sock"
        ));
        Outsider::start(command, image)
    }

    /// Starts it and waits until it holds the image's lock.
    fn start(mut command: Command, image: &str) -> Outsider {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let outsider = Outsider(quiet.spawn().expect("it starts"));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // QEMU's locks are of the kind that qvirt's own are.
        while !launcher::locks::probe(image.as_ref()).expect("the image is there") {
            assert!(std::time::Instant::now() < until, "nobody locks {image}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        outsider
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        // It is ours and not reaped, so the number is its own.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_vm_has_it() {
    let vm = bare("[[disk]]\npath = \"a.img\"\n");
    vm.raw("a.img", 4, "a");
    start_paused(&vm);
    let twice = ["attach", "guest", "--disk", "path=a.img,id=twice"];
    let error = "twice: DIR/a.img is in use: device disk0 of VM guest (user root) has it as DIR/a.img; detach it there first";
    is_refusal(&vm, &vm.qvirt(&twice), 3, &of_this_user(error));
    // Another VM of the same host, by a link: what counts is the file.
    std::fs::hard_link(vm.path("a.img"), vm.path("link.img")).expect("linked");
    edit(&vm, "\"guest\"", "\"other\"");
    edit(&vm, "a.img", "link.img");
    let error = "VM other did not start: device disk0: DIR/link.img is in use: device disk0 of VM guest (user root) has it as DIR/a.img; \
                 detach it there first";
    is_refusal(&vm, &vm.qvirt(&["start", &file(&vm)]), 3, &of_this_user(error));
    assert!(!vm.root().join("run/other").exists(), "nothing is left of the other VM");
    vm.end();
}

/// The same with the name of whoever runs the tests.
fn of_this_user(error: &str) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).ok().flatten();
    let name = user.map_or_else(|| format!("uid {}", nix::unistd::Uid::effective()), |user| user.name);
    error.replace("(user root)", &format!("(user {name})"))
}

/// The outsider is named and the VM is not: no word of an earlier start may be among QEMU's last words.
fn start_is_refused(vm: &Vm, output: &Output, outsider: &Outsider, name: &str) {
    assert_eq!(output.code, 1, "{output}");
    let text = said(vm, &output.stderr);
    let lines: Vec<&str> = text.lines().collect();
    let [what, words, lock, question, who] = lines.as_slice() else { panic!("{text}") };
    assert_eq!(
        *what,
        "qvirt: VM guest did not start: QEMU exited with status 1 before it could be asked anything"
    );
    assert_eq!(*words, "QEMU's last words:");
    assert!(lock.ends_with("Failed to get \"write\" lock"), "{lock}");
    assert_eq!(*question, "Is another process using the image [DIR/a.img]?");
    let pid = outsider.0.id();
    assert_eq!(
        *who,
        format!("DIR/a.img is open in process {pid} ({name}): end what uses it, or wait for it")
    );
    vm.nothing_left();
}

#[test]
fn a_process_outside_qvirt_has_it() {
    let vm = bare("[[scsi_controller]]\nid = \"s0\"\n[[disk]]\npath = \"a.img\"\n");
    let [a, b] = ["a.img", "b.img"].map(|name| vm.raw(name, 4, name));
    let outsider = Outsider::qemu(&a);
    for command in ["start", "run"] {
        start_is_refused(&vm, &vm.qvirt(&[command, "--paused", &file(&vm)]), &outsider, "qemu-system-x86");
    }
    drop(outsider);
    start_paused(&vm);

    // Hot: the device is undone as well, and comes once the image is free.
    let outsider = Outsider::daemon(&b);
    let attach = ["attach", "guest", "--disk", "path=b.img,id=b,bus=scsi"];
    let output = vm.qvirt(&attach);
    let pid = outsider.0.id();
    let error = format!(
        "attach b: step frontend failed, and everything before it was undone: device_add: QEMU answered GenericError: Failed to get shared \
         \"write\" lock; DIR/b.img is open in process {pid} (qemu-storage-da): end what uses it, or wait for it"
    );
    is_refusal(&vm, &output, 1, &error);
    assert_eq!(vm.device_ids(), ["disk0", "s0"]);
    drop(outsider);
    vm.ok(&attach);
    vm.end();
}

/// A VM file of another root, so of other leases: QEMU's lock is what is left.
#[test]
fn a_vm_of_other_leases_has_it() {
    let vm = bare("[[disk]]\npath = \"a.img\"\n");
    vm.raw("a.img", 4, "a");
    start_paused(&vm);
    let other = vm.root().join("other");
    let mut command = vm.command(&["start", "--paused", &file(&vm)]);
    let output = finished(command.env("QVIRT_ROOT", &other).spawn().expect("qvirt starts"));
    assert_eq!(output.code, 1, "{output}");
    let pid = vm.qemu_pid();
    assert!(
        output.stderr.contains(&format!("a.img is open in process {pid} (qemu-system-x86): end")),
        "{output}"
    );
    assert!(!other.join("run/guest").exists(), "nothing is left of the other VM");
    vm.end();
}
