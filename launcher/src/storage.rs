//! Which storage a path is on, told without touching that storage, which may hang: by the table of mounts, as text.
//!
//! Symbolic links are taken as they stand, except below `/dev`, where asking costs no I/O.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::{major, minor};

/// The mounts of this process.
#[derive(Debug, Default)]
pub struct Mounts(Vec<Mount>);

#[derive(Debug)]
struct Mount {
    /// `MAJOR:MINOR` of what is mounted: one number for all mounts of a file system.
    device: String,
    point: String,
}

/// Where a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage<'a> {
    path: &'a str,
    device: Option<String>,
}

impl Mounts {
    /// Reads them.
    pub fn read() -> Mounts {
        // Without it only paths are compared.
        Mounts::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// From the text of `/proc/PID/mountinfo`.
    pub fn parse(text: &str) -> Mounts {
        let mount = |line: &str| {
            let mut fields = line.split(' ').skip(2);
            let device = fields.next()?.to_owned();
            Some(Mount { device, point: unescaped(fields.nth(1)?) })
        };
        Mounts(text.lines().filter_map(mount).collect())
    }

    /// The storage of an absolute path. A block device is its own.
    pub fn storage<'a>(&self, path: &'a str) -> Storage<'a> {
        let node = path.starts_with("/dev/").then(|| std::fs::metadata(path).ok()).flatten();
        let block_device = node.filter(|node| node.file_type().is_block_device()).map(|node| node.rdev());
        let number = |device: u64| format!("{}:{}", major(device), minor(device));
        Storage { path, device: block_device.map(number).or_else(|| self.mounted(path)) }
    }

    /// The device of the mount that a path is below. Of several on one point the last one hides the others.
    fn mounted(&self, path: &str) -> Option<String> {
        let is_below = |point: &str| {
            let rest = path.strip_prefix(point.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let above = self.0.iter().filter(|mount| is_below(&mount.point));
        above.max_by_key(|mount| mount.point.len()).map(|mount| mount.device.clone())
    }
}

impl Storage<'_> {
    /// Whether both fail together.
    pub fn is_shared_with(&self, other: &Storage<'_>) -> bool {
        self.path == other.path || (self.device.is_some() && self.device == other.device)
    }
}

/// The kernel writes blanks and backslashes of a path in octal.
fn unescaped(field: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(field.to_owned(), |text, (escape, meaning)| text.replace(escape, meaning))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw shared:2 - proc proc rw
30 22 0:40 / /srv/nfs rw shared:3 - nfs4 host:/export rw
31 22 8:17 / /srv/my\\040disk rw shared:4 - xfs /dev/sdb1 rw
32 22 8:17 /sub /bind rw shared:4 - xfs /dev/sdb1 rw
33 30 0:41 / /srv/nfs rw - tmpfs none rw
";

    #[test]
    fn paths_of_one_file_system_share_their_storage() {
        let mounts = Mounts::parse(MOUNTS);
        let shared = |a, b| mounts.storage(a).is_shared_with(&mounts.storage(b));
        assert!(shared("/srv/a.img", "/var/b.img"));
        assert!(shared("/srv/my disk/a.img", "/bind/b.img"), "one file system, mounted twice");
        assert!(!shared("/srv/my disk/a.img", "/srv/b.img"));
        assert!(!shared("/srv/nfs/a.img", "/srv/nfsx/a.img"), "a whole name, not a beginning of one");
        assert_eq!(
            mounts.storage("/srv/nfs/a.img").device.as_deref(),
            Some("0:41"),
            "the last mount hides the others"
        );
    }

    #[test]
    fn without_mounts_only_paths_tell() {
        let mounts = Mounts::default();
        let shared = |a, b| mounts.storage(a).is_shared_with(&mounts.storage(b));
        assert!(shared("/srv/a.img", "/srv/a.img") && !shared("/srv/a.img", "/srv/b.img"));
    }

    #[test]
    fn the_mounts_of_this_process_are_read() {
        assert!(Mounts::read().storage("/").device.is_some());
    }
}
