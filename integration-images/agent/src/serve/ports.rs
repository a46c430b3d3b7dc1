//! The virtio-serial ports of a name, whenever there are some: one can be plugged at any time.

use std::collections::HashMap;
use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use super::line::Line;

/// sysfs gives no sign of a new port that could be awaited, and there is no udev.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Serves each such port in a thread of its own, for ever. `root` is where `sys` and `dev` are.
pub(super) fn serve(root: &Path, name: &str) -> ! {
    let mut served: HashMap<PathBuf, JoinHandle<()>> = HashMap::new();
    loop {
        served.retain(|_, thread| !thread.is_finished());
        for device in named(root, name) {
            if served.contains_key(&device) {
                continue;
            }
            // It may have gone since, or be in somebody else's hands, and is tried again.
            let thread = Line::port(&device).and_then(Line::serve_in_background);
            if let Ok(thread) = thread {
                served.insert(device, thread);
            }
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The device files of the ports with that name.
fn named(root: &Path, name: &str) -> Vec<PathBuf> {
    let ports = read_dir(root.join("sys/class/virtio-ports")).into_iter().flatten().flatten();
    let ours = ports
        .filter(|port| read_to_string(port.path().join("name")).is_ok_and(|text| text.trim_end() == name));
    ours.map(|port| root.join("dev").join(port.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn a_port_is_found_by_its_name() {
        let root = tempfile::tempdir().expect("a folder");
        for (port, name) in
            [("vport1p0", ""), ("vport1p1", "org.qvirt.agent\n"), ("vport1p2", "org.qvirt.agent.0\n")]
        {
            let folder = root.path().join("sys/class/virtio-ports").join(port);
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(folder.join("name"), name).expect("a file");
        }
        assert_eq!(named(root.path(), "org.qvirt.agent"), [root.path().join("dev/vport1p1")]);
        assert!(named(&root.path().join("none"), "x").is_empty());
    }
}
