//! A guest that boots from a device of the host: the firmware finds it, and reads from it.

use std::os::unix::fs::FileExt;

use tests::lab::host::{scsi, vdpa};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::vm::Vm;

/// A boot sector that reads the next sector and writes the text in it to the first serial port:
///
/// ```text
///     xor ax, ax; mov ds, ax; mov es, ax
///     mov bx, 0x7e00; mov ax, 0x0201; mov cx, 2; mov dh, 0; int 0x13    ; the firmware left the drive in dl
///     jc $
///     mov si, 0x7e00; cld
/// 1:  lodsb; test al, al; jz 2f; mov dx, 0x3f8; out dx, al; jmp 1b
/// 2:  hlt; jmp 2b
/// ```
const LOADER: &[u8] = b"\x31\xc0\x8e\xd8\x8e\xc0\xbb\x00\x7e\xb8\x01\x02\xb9\x02\x00\xb6\x00\xcd\x13\x72\xfe\
\xbe\x00\x7e\xfc\xac\x84\xc0\x74\x06\xba\xf8\x03\xee\xeb\xf5\xf4\xeb\xfd";

/// A system that says that text, in place of what a file of the host has; the former bytes are back at the end.
struct System {
    file: std::fs::File,
    before: [u8; 1024],
}

impl System {
    fn install(path: &str, text: &str) -> System {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("the host's file");
        let mut before = [0; 1024];
        file.read_exact_at(&mut before, 0).expect("two sectors");
        file.write_all_at(&sectors(text), 0).and_then(|()| file.sync_all()).expect("written");
        System { file, before }
    }
}

/// The loader, and the text that it says.
fn sectors(text: &str) -> [u8; 1024] {
    let mut sectors = [0; 1024];
    sectors[..LOADER.len()].copy_from_slice(LOADER);
    sectors[510..512].copy_from_slice(b"\x55\xaa");
    sectors[512..512 + text.len()].copy_from_slice(text.as_bytes());
    sectors
}

impl Drop for System {
    fn drop(&mut self) {
        // The next test would see what is left, and say so.
        let _ = self.file.write_all_at(&self.before, 0);
    }
}

/// Boots what is installed in a file, from the device of that table; another system is on a disk that comes later in the boot order.
fn boots(version: QemuVersion, file: &str, table: &str) {
    let text = format!("started from {file}\r\n");
    let _system = System::install(file, &text);
    let vm = Vm::with_memory(version, "", 4, "{ size = \"256MiB\", shared = true }", "");
    let decoy = vm.raw("decoy.img", 1, "");
    std::fs::write(&decoy, sectors("the wrong disk\r\n")).expect("written");
    let config = std::fs::read_to_string(vm.config()).expect("the VM file");
    let (head, rest) = config.split_once("[kernel]").expect("a kernel");
    let (_, rest) = rest.split_once("[pcie]").expect("ports");
    let disks = format!("[[disk]]\nid = \"decoy\"\npath = {decoy:?}\nbootindex = 2\n\n{table}");
    std::fs::write(vm.config(), format!("{head}[pcie]{rest}\n{disks}")).expect("the VM file is written");
    step(&format!("{version}: {table}"), || {
        vm.start();
        let console = || std::fs::read(vm.path("console.log")).unwrap_or_default();
        vm.wait_for("a system's words", || console().ends_with(b"\r\n"));
        assert_eq!(String::from_utf8_lossy(&console()), text);
        vm.end();
    });
}

#[test]
fn a_guest_boots_from_vdpa() {
    inside(|| {
        let table = format!("[[vdpa]]\nid = \"sys\"\ndevice = {:?}\nbootindex = 1\n", vdpa::DISK);
        boots(QemuVersion::V10_0, "/run/lab/vdpa0.img", &table);
    });
}

mod soak {
    use super::*;

    #[test]
    fn a_guest_boots_from_vhost_scsi() {
        inside(|| {
            let table = format!(
                "[[vhost_scsi]]\nid = \"sys\"\nwwpn = {:?}\nboot_tpgt = 1\nbootindex = 1\n",
                scsi::TARGET
            );
            for version in QemuVersion::ALL {
                boots(version, &format!("/run/lab/{}.img", scsi::LUNS[0].0), &table);
            }
        });
    }
}
