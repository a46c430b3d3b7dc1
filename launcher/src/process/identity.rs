//! What tells one process from every other: pid, start time, boot.
//!
//! A bare pid is re-used; with its start time (clock ticks since the boot) and the boot's id it is not.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The id of a boot of this host. What is valid until the next boot carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(String);

impl BootId {
    /// The running boot's, from the kernel.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> io::Result<BootId> {
        let path = "/proc/sys/kernel/random/boot_id";
        let id = fs::read_to_string(path).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot read {path} (is /proc mounted?): {error}"))
        })?;
        Ok(BootId(id.trim().into()))
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for BootId {
    fn from(id: &str) -> BootId {
        BootId(id.into())
    }
}

/// One process, for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its number, re-used after its end.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks from the boot to its start.
    pub start_time: u64,
    /// The boot it runs in.
    pub boot: BootId,
}

impl Identity {
    /// Of the process that has the number `pid` now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: u32) -> io::Result<Identity> {
        let boot = BootId::current()?;
        match read_stat(pid)? {
            Some((_, start_time)) => Ok(Identity { pid, start_time, boot }),
            None => Err(io::Error::other(format!("/proc/{pid}/stat is not as proc(5) describes it"))),
        }
    }

    /// Whether this very process runs; one that has ended and is not reaped yet does not.
    pub fn is_alive(&self) -> bool {
        let same_boot = BootId::current().is_ok_and(|boot| boot == self.boot);
        let ended = |state| matches!(state, 'Z' | 'X' | 'x');
        same_boot
            && matches!(read_stat(self.pid), Ok(Some((state, start))) if start == self.start_time && !ended(state))
    }
}

fn read_stat(pid: u32) -> io::Result<Option<(char, u64)>> {
    // The program's name may be any bytes, so this is not always UTF-8.
    let stat = fs::read(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    Ok(parse_stat(&String::from_utf8_lossy(&stat)))
}

/// The state (field 3) and the start time (field 22). Field 2, the name, may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_moves_no_field() {
        let tail = "S 1 10 10 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 987654 4096 100";
        assert_eq!(parse_stat(&format!("7 (qemu) {tail}")), Some(('S', 987654)));
        assert_eq!(parse_stat(&format!("7 (a) R 1 (b c) {tail}")), Some(('S', 987654)));
        assert_eq!(parse_stat("7 (qemu) S 1 2"), None);
    }

    #[test]
    fn this_process_is_alive_and_its_pid_at_another_time_or_boot_is_not() {
        let me = Identity::of(std::process::id()).expect("this process");
        assert!(me.is_alive());
        assert!(!Identity { start_time: me.start_time + 1, ..me.clone() }.is_alive());
        assert!(!Identity { boot: "another".into(), ..me.clone() }.is_alive());
        let text = serde_json::to_string(&me).expect("plain data");
        assert_eq!(serde_json::from_str::<Identity>(&text).expect("its own text"), me);
    }
}
