//! Whether a guest uses a USB disk of the host: what can be seen of it from here, and what cannot.
//!
//! Two things can: the transfers that the kernel counts, and, where a guest agent runs, where the guest has mounted the disk. What the guest has
//! written to its cache and not yet to the disk cannot, nor who has a disk open without a file system.

use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::usb::UsbNeed;
use serde_json::Value;

use crate::host::sysfs::{Sysfs, text};
use crate::snapshot::freeze::Agent;

/// How long transfers are counted.
const LOOK: Duration = Duration::from_secs(1);

/// How long the guest's agent may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// So many transfers a second are a guest that only asks whether the medium was changed.
const IDLE: u64 = 8;

/// Where the guest has mounted a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounts {
    /// The VM has no channel for a guest agent.
    NoChannel,
    /// There is one, and nobody answers.
    NoAnswer,
    /// Nowhere.
    None,
    /// At these places.
    At(Vec<String>),
}

/// What can be seen of a guest's use of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Transfers in the last second; none if the kernel does not say.
    pub transfers: Option<u64>,
    /// Where it is mounted.
    pub mounts: Mounts,
}

impl Usage {
    /// Looks for a second. `agent` is the socket of the guest agent's channel.
    pub async fn look(need: &UsbNeed, agent: Option<PathBuf>) -> Usage {
        let transfers = async {
            let before = transfers(need)?;
            tokio::time::sleep(LOOK).await;
            transfers(need)?.checked_sub(before)
        };
        let (transfers, mounts) = tokio::join!(transfers, mounts(need, agent.as_deref()));
        Usage { transfers, mounts }
    }

    /// Whether the guest is seen to use it.
    pub fn is_use(&self) -> bool {
        matches!(self.mounts, Mounts::At(_)) || self.transfers.is_some_and(|count| count > IDLE)
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.transfers {
            Some(0) => f.write_str("no transfer in the last second")?,
            Some(count) => write!(f, "{count} transfers in the last second")?,
            None => f.write_str("how much it transfers is not known")?,
        }
        match &self.mounts {
            Mounts::NoChannel => f.write_str(
                ", whether it is mounted is not known (this VM has no [[channel]] with guest_agent = true)",
            ),
            Mounts::NoAnswer => {
                f.write_str(", whether it is mounted is not known (the guest's agent does not answer)")
            }
            Mounts::None => f.write_str(", and not mounted, by the guest's agent"),
            Mounts::At(places) => write!(f, ", mounted at {}, by the guest's agent", places.join(", ")),
        }
    }
}

/// How many transfers the kernel has begun since the device was plugged in.
fn transfers(need: &UsbNeed) -> Option<u64> {
    text(&Sysfs::default().path(&format!("bus/usb/devices/{}-{}/urbnum", need.bus, need.port)))?.parse().ok()
}

async fn mounts(need: &UsbNeed, agent: Option<&Path>) -> Mounts {
    let Some(agent) = agent else { return Mounts::NoChannel };
    let asking = async { Agent::connect(agent).await?.file_systems().await };
    match tokio::time::timeout(ANSWER, asking).await {
        Ok(Ok(systems)) => match mounted(&systems, need.serial.as_deref()) {
            none if none.is_empty() => Mounts::None,
            places => Mounts::At(places),
        },
        Ok(Err(_)) | Err(_) => Mounts::NoAnswer,
    }
}

/// The places of file systems on a USB disk: on that one, where the agent tells serial numbers. qemu-ga on Linux does not know the bus of a USB
/// disk (seen with 7.2), and has the serial number from udev.
fn mounted(systems: &Value, serial: Option<&str>) -> Vec<String> {
    let is = |disk: &Value| {
        let same = |serial: &str| disk["serial"].as_str().is_none_or(|told| told.contains(serial));
        matches!(disk["bus-type"].as_str(), Some("usb" | "unknown")) && serial.is_none_or(same)
    };
    let on = |system: &&Value| system["disk"].as_array().into_iter().flatten().any(is);
    let place = |system: &Value| system["mountpoint"].as_str().map(str::to_owned);
    systems.as_array().into_iter().flatten().filter(on).filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_is_told_by_its_bus_and_serial_number() {
        let on =
            |bus: &str, serial: Option<&str>| json!({"bus-type": bus, "serial": serial, "dev": "/dev/sda"});
        let disk = |serial: Option<&str>| on("usb", serial);
        let systems = json!([
            {"mountpoint": "/", "disk": [{"bus-type": "virtio", "serial": "A1"}]},
            {"mountpoint": "/media/a", "disk": [disk(Some("lab_red_A1-0:0"))]},
            {"mountpoint": "/media/b", "disk": [disk(Some("lab_blue_B2-0:0"))]},
            {"mountpoint": "/media/c", "disk": [disk(None)]},
            {"mountpoint": "/media/d", "disk": [on("unknown", Some("lab_red_A1-0:0"))]},
            {"mountpoint": "/media/e", "disk": [on("unknown", Some("lab_blue_B2-0:0"))]},
        ]);
        assert_eq!(mounted(&systems, Some("A1")), ["/media/a", "/media/c", "/media/d"]);
        assert_eq!(mounted(&systems, None).len(), 5);
        assert_eq!(mounted(&json!([]), Some("A1")), Vec::<String>::new());
    }

    #[test]
    fn what_is_known_is_said_and_what_is_not() {
        let usage = |transfers, mounts| Usage { transfers, mounts };
        assert!(usage(Some(9), Mounts::NoChannel).is_use() && !usage(Some(8), Mounts::None).is_use());
        assert!(
            usage(Some(0), Mounts::At(vec!["/mnt".into()])).is_use()
                && !usage(None, Mounts::NoAnswer).is_use()
        );
        assert_eq!(
            usage(Some(0), Mounts::NoAnswer).to_string(),
            "no transfer in the last second, whether it is mounted is not known (the guest's agent does not answer)"
        );
    }
}
