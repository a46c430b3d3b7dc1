//! Which accelerator runs the guest: hardware (KVM) or translation (TCG).
//!
//! Owns the choice and its reason. `/dev/kvm` that opens proves nothing: where an x86 processor shows neither
//! `vmx` nor `svm`, KVM can be a software variant that stops an ordinary guest with "KVM internal error". So
//! KVM counts as usable on x86 only with one of these flags; elsewhere the device alone decides.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The value of `accel` in a config.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Translation, on every host.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        })
    }
}

/// Why an accelerator was not chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum AccelError {
    #[error("there is no accelerator {0:?}: use auto, kvm or tcg")]
    Unknown(String),
    #[error("accel is kvm, but {reason}: {next}, or set accel to tcg or auto")]
    NoKvm { reason: String, next: &'static str },
}

impl FromStr for Accel {
    type Err = AccelError;

    fn from_str(text: &str) -> Result<Accel, AccelError> {
        match text {
            "auto" => Ok(Accel::Auto),
            "kvm" => Ok(Accel::Kvm),
            "tcg" => Ok(Accel::Tcg),
            _ => Err(AccelError::Unknown(text.into())),
        }
    }
}

/// What this host says about hardware virtualization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// The processor's flag for it.
    pub virtualization: Virtualization,
    /// How opening `/dev/kvm` for reading and writing went.
    pub kvm: KvmNode,
}

/// What the processor says about hardware virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel's flag.
    Vmx,
    /// AMD's flag.
    Svm,
    /// An x86 processor with neither.
    Absent,
    /// Not x86: no flag tells.
    NotX86,
}

/// How opening `/dev/kvm` went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmNode {
    /// It opens.
    Usable,
    /// There is none.
    Missing,
    /// This user may not open it.
    Denied,
    /// It does not open for this reason.
    Failed(io::ErrorKind),
}

impl HostFacts {
    /// Looks at this host.
    pub fn read() -> HostFacts {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let virtualization = match cfg!(any(target_arch = "x86_64", target_arch = "x86")) {
            true => Virtualization::of_x86(&cpuinfo),
            false => Virtualization::NotX86,
        };
        let kvm = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) => KvmNode::Usable,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => KvmNode::Missing,
                io::ErrorKind::PermissionDenied => KvmNode::Denied,
                kind => KvmNode::Failed(kind),
            },
        };
        HostFacts { virtualization, kvm }
    }

    /// Why KVM is usable here, or why not and what to do about it.
    fn kvm_usable(&self) -> Result<String, (String, &'static str)> {
        match self.kvm {
            KvmNode::Usable => {}
            KvmNode::Missing => {
                return Err((
                    "/dev/kvm does not exist".into(),
                    "load the module (modprobe kvm_intel or kvm_amd) or switch virtualization on in the firmware",
                ));
            }
            KvmNode::Denied => {
                return Err((
                    "this user may not open /dev/kvm".into(),
                    "add the user to the group kvm (usermod -aG kvm USER) and log in again",
                ));
            }
            KvmNode::Failed(kind) => {
                return Err((format!("/dev/kvm does not open ({kind})"), "see the kernel's log for kvm"));
            }
        }
        match self.virtualization {
            Virtualization::Vmx => Ok("the processor has vmx and /dev/kvm opens".into()),
            Virtualization::Svm => Ok("the processor has svm and /dev/kvm opens".into()),
            Virtualization::NotX86 => Ok("/dev/kvm opens".into()),
            Virtualization::Absent => Err((
                "/dev/kvm opens but the processor has neither vmx nor svm, so it is no hardware virtualization".into(),
                "switch virtualization on in the firmware, or nested virtualization on the host of this machine",
            )),
        }
    }
}

impl Virtualization {
    /// From the text of `/proc/cpuinfo` of an x86 host.
    fn of_x86(cpuinfo: &str) -> Virtualization {
        let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
        let mut flags = flags.map_or("", |(_, flags)| flags).split_ascii_whitespace();
        let found = flags.find_map(|flag| match flag {
            "vmx" => Some(Virtualization::Vmx),
            "svm" => Some(Virtualization::Svm),
            _ => None,
        });
        found.unwrap_or(Virtualization::Absent)
    }
}

/// The accelerator to use, [`Accel::Kvm`] or [`Accel::Tcg`], and why, for people.
///
/// # Errors
/// KVM was asked for and does not work here.
pub fn choose(requested: Accel, facts: &HostFacts) -> Result<(Accel, String), AccelError> {
    match (requested, facts.kvm_usable()) {
        (Accel::Tcg, _) => Ok((Accel::Tcg, "the config says so".into())),
        (Accel::Kvm | Accel::Auto, Ok(reason)) => Ok((Accel::Kvm, reason)),
        (Accel::Auto, Err((reason, _))) => Ok((Accel::Tcg, reason)),
        (Accel::Kvm, Err((reason, next))) => Err(AccelError::NoKvm { reason, next }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(virtualization: Virtualization, kvm: KvmNode) -> HostFacts {
        HostFacts { virtualization, kvm }
    }

    #[test]
    fn auto_takes_kvm_only_with_flag_and_device() {
        use Virtualization::{Absent, NotX86, Svm, Vmx};
        let auto =
            |virtualization, kvm| choose(Accel::Auto, &host(virtualization, kvm)).expect("auto never fails");
        assert_eq!(auto(Vmx, KvmNode::Usable).0, Accel::Kvm);
        assert_eq!(
            auto(Svm, KvmNode::Usable),
            (Accel::Kvm, "the processor has svm and /dev/kvm opens".into())
        );
        assert_eq!(auto(NotX86, KvmNode::Usable).0, Accel::Kvm);
        let (accel, reason) = auto(Absent, KvmNode::Usable);
        assert_eq!(accel, Accel::Tcg);
        assert!(reason.contains("neither vmx nor svm"), "{reason}");
        assert_eq!(auto(Vmx, KvmNode::Denied), (Accel::Tcg, "this user may not open /dev/kvm".into()));
        assert_eq!(auto(Vmx, KvmNode::Missing).0, Accel::Tcg);
    }

    #[test]
    fn kvm_or_nothing_says_what_to_do() {
        assert_eq!(
            choose(Accel::Kvm, &host(Virtualization::Vmx, KvmNode::Usable)).expect("works").0,
            Accel::Kvm
        );
        let error =
            |kvm| choose(Accel::Kvm, &host(Virtualization::Absent, kvm)).expect_err("refused").to_string();
        assert!(error(KvmNode::Usable).contains("nested"));
        assert!(error(KvmNode::Denied).contains("usermod"));
        assert!(error(KvmNode::Missing).contains("modprobe"));
        assert!(error(KvmNode::Failed(io::ErrorKind::ResourceBusy)).contains("set accel to tcg"));
        assert_eq!(
            choose(Accel::Tcg, &host(Virtualization::Vmx, KvmNode::Usable)).expect("always").0,
            Accel::Tcg
        );
    }

    #[test]
    fn the_flags_line_is_read_by_whole_words() {
        let of =
            |flags| Virtualization::of_x86(&format!("model name\t: vmx svm\nflags\t\t: fpu {flags} sse\n"));
        assert_eq!(of("vmx"), Virtualization::Vmx);
        assert_eq!(of("svm"), Virtualization::Svm);
        assert_eq!(of("svm_lock vmxnet"), Virtualization::Absent);
        assert_eq!(Virtualization::of_x86(""), Virtualization::Absent);
        // Newer kernels have a line `vmx flags` as well.
        assert_eq!(Virtualization::of_x86("vmx flags\t: ept\nflags : sse\n"), Virtualization::Absent);
    }

    #[test]
    fn the_words_of_a_config() {
        assert_eq!("kvm".parse::<Accel>().expect("known").to_string(), "kvm");
        assert!("hvf".parse::<Accel>().expect_err("unknown").to_string().contains("tcg"));
    }
}
