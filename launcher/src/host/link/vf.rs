//! Profiles of virtual functions, which the kernel keeps with the interface of their physical function.
//!
//! Each setting is sent by itself, so that a driver's refusal names the setting.

use devices::vf::{LinkState, Rate, VfProfile};
use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac, VfInfoRate,
    VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};

use super::{Link, LinkError, request};

/// The profiles of a physical function's virtual ones, by their number.
///
/// # Errors
/// There is no such interface, or the kernel says no.
pub fn profiles(pf: &str) -> Result<Vec<VfProfile>, LinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(pf.to_owned()));
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
    let step = format!("read the virtual functions of {pf}");
    let answer = request(RouteNetlinkMessage::GetLink(message), 0, step)?;
    let attributes = answer.into_iter().flat_map(|link| link.attributes);
    let lists = attributes.filter_map(|attribute| match attribute {
        LinkAttribute::VfInfoList(list) => Some(list),
        _ => None,
    });
    Ok(lists.flatten().map(|LinkVfInfo(infos)| read(&infos)).collect())
}

fn read(infos: &[VfInfo]) -> VfProfile {
    let mut profile = VfProfile::default();
    for info in infos {
        match info {
            VfInfo::Mac(info) => profile.mac = mac_of(&info.mac),
            VfInfo::Vlan(info) => {
                profile.vlan = u16::try_from(info.vlan_id).unwrap_or_default();
                profile.qos = u8::try_from(info.qos).unwrap_or_default();
            }
            VfInfo::Rate(info) => {
                profile.rate_min = Rate::mbits(info.min_tx_rate);
                profile.rate_max = Rate::mbits(info.max_tx_rate);
            }
            VfInfo::SpoofCheck(info) => profile.spoofchk = Some(info.enabled),
            VfInfo::Trust(info) => profile.trust = Some(info.enabled),
            VfInfo::LinkState(info) => {
                profile.link_state = match info.state {
                    VfLinkState::Auto => Some(LinkState::Auto),
                    VfLinkState::Enable => Some(LinkState::Enable),
                    VfLinkState::Disable => Some(LinkState::Disable),
                    _ => None,
                }
            }
            _ => {}
        }
    }
    profile
}

/// All zero is none.
fn mac_of(bytes: &[u8]) -> Option<devices::units::Mac> {
    let [a, b, c, d, e, g, ..] = bytes else { return None };
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}").parse().ok()
}

/// Changes those settings of virtual function `index` in which `wanted` is not `now`.
///
/// # Errors
/// The first setting that the driver refuses; those before it are made.
pub fn change(pf: &Link, index: u32, now: &VfProfile, wanted: &VfProfile) -> Result<(), LinkError> {
    for (what, info) in settings(index, now, wanted) {
        let step = format!("set the {what} of virtual function {index} of {}", pf.name);
        match send(pf, info, step.clone()) {
            // Some drivers know no way back to "none was set".
            Err(_) if what == "MAC address" && wanted.mac.is_none() => {
                send(pf, VfInfo::Mac(VfInfoMac::new(index, &NOBODY)), step)?;
            }
            outcome => outcome?,
        }
    }
    Ok(())
}

/// An address that is nobody's, for drivers that do not take none at all.
const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 0];

fn settings(index: u32, now: &VfProfile, wanted: &VfProfile) -> Vec<(&'static str, VfInfo)> {
    let mut settings = Vec::new();
    if wanted.mac != now.mac {
        let bytes = wanted.mac.map_or([0; 6], |mac| mac.bytes());
        settings.push(("MAC address", VfInfo::Mac(VfInfoMac::new(index, &bytes))));
    }
    if (wanted.vlan, wanted.qos) != (now.vlan, now.qos) {
        let vlan = VfInfoVlan::new(index, wanted.vlan.into(), wanted.qos.into());
        settings.push(("VLAN", VfInfo::Vlan(vlan)));
    }
    if (wanted.rate_min, wanted.rate_max) != (now.rate_min, now.rate_max) {
        let rate = VfInfoRate::new(index, wanted.rate_min.as_mbits(), wanted.rate_max.as_mbits());
        settings.push(("rates", VfInfo::Rate(rate)));
    }
    if let Some(enabled) = wanted.spoofchk.filter(|_| wanted.spoofchk != now.spoofchk) {
        settings.push(("spoof check", VfInfo::SpoofCheck(VfInfoSpoofCheck::new(index, enabled))));
    }
    if let Some(enabled) = wanted.trust.filter(|_| wanted.trust != now.trust) {
        settings.push(("trust", VfInfo::Trust(VfInfoTrust::new(index, enabled))));
    }
    if let Some(state) = wanted.link_state.filter(|_| wanted.link_state != now.link_state) {
        let state = match state {
            LinkState::Auto => VfLinkState::Auto,
            LinkState::Enable => VfLinkState::Enable,
            LinkState::Disable => VfLinkState::Disable,
        };
        settings.push(("link state", VfInfo::LinkState(VfInfoLinkState::new(index, state))));
    }
    settings
}

fn send(pf: &Link, info: VfInfo, step: String) -> Result<(), LinkError> {
    let mut message = LinkMessage::default();
    message.header.index = pf.index;
    message.attributes.push(LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![info])]));
    request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, step).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_sent() {
        let now = VfProfile { spoofchk: Some(true), trust: Some(false), ..VfProfile::default() };
        assert!(settings(0, &now, &now).is_empty());
        let mac = "52:54:00:00:00:01".parse().ok();
        let wanted = VfProfile { mac, vlan: 7, rate_max: Rate::mbits(100), trust: Some(true), ..now.clone() };
        let sent = settings(3, &now, &wanted);
        let names: Vec<&str> = sent.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["MAC address", "VLAN", "rates", "trust"]);
        let infos: Vec<VfInfo> = sent.into_iter().map(|(_, info)| info).collect();
        assert_eq!(read(&infos), VfProfile { spoofchk: None, ..wanted }, "what is sent is what is read");
    }
}
