//! Laws of texts: what is printed is read back as it was, and nothing else has the same text.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use devices::address::{Address, ScsiAddress};
use devices::units::{Mac, Millis, Size};
use devices::{DeviceConfig, DeviceId};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::configs;

/// By `Display`, and by serde as JSON.
fn comes_back<T>(value: &T) -> Result<(), TestCaseError>
where
    T: Display + FromStr + PartialEq + Debug + Serialize + DeserializeOwned,
    T::Err: Debug,
{
    let text = value.to_string();
    prop_assert_eq!(&text.parse::<T>().expect("what was printed"), value);
    let json = serde_json::to_string(value).expect("a text");
    prop_assert_eq!(&json, &serde_json::to_string(&text).expect("a text"));
    prop_assert_eq!(&serde_json::from_str::<T>(&json).expect("what was printed"), value);
    Ok(())
}

/// A text that is read is printed in one way only.
fn settles<T>(text: &str) -> Result<(), TestCaseError>
where
    T: Display + FromStr + PartialEq + Debug,
    T::Err: Debug + Display,
{
    match text.parse::<T>() {
        Ok(value) => prop_assert_eq!(&value.to_string().parse::<T>().expect("what was printed"), &value),
        Err(error) => prop_assert!(error.to_string().contains(&format!("{text:?}")), "{}", error),
    }
    Ok(())
}

fn address() -> impl Strategy<Value = Address> {
    prop_oneof![
        configs::pci_seat().prop_map(Address::Pci),
        (any::<u8>(), any::<u8>(), 0..ScsiAddress::UNITS)
            .prop_map(|(controller, target, unit)| Address::Scsi(ScsiAddress { controller, target, unit })),
        (any::<u8>(), any::<u8>()).prop_map(|(controller, nr)| Address::SerialPort { controller, nr }),
        any::<u8>().prop_map(Address::Isa),
        (any::<u8>(), 1..=u8::MAX).prop_map(|(controller, port)| Address::Usb { controller, port }),
    ]
}

proptest! {
    #[test]
    fn newtypes_come_back(
        id in configs::id(), vd in configs::label("vd"), sd in configs::label("sd"), mac in configs::mac(),
        bytes in any::<u64>(), shift in 0_u32..64, number in 0_u64..100_000, unit in "ms|s|m|h",
        seat in configs::pci_seat(), address in address(), usb in configs::usb_selector(),
    ) {
        comes_back(&id)?;
        comes_back(&vd)?;
        comes_back(&sd)?;
        comes_back(&mac)?;
        comes_back(&Size::bytes(bytes))?;
        comes_back(&Size::bytes(bytes >> shift << shift))?;
        comes_back(&format!("{number}{unit}").parse::<Millis>().expect("a time"))?;
        comes_back(&seat)?;
        comes_back(&address)?;
        comes_back(&usb)?;
    }

    #[test]
    fn any_text_is_read_or_named_in_the_error(
        text in "\\PC{0,20}", size in "[0-9]{1,20} ?[KMGT]?i?B?", time in "[0-9]{1,20}[msh]{0,2}",
        mac in "[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{2}){4,6}", usb in "[0-9a-f]{1,4}[:.-][0-9a-f]{1,4}([:.][0-9a-f]{0,4}){0,6}", address in "(pcie\\.0|scsi|rp1|isa-serial|usb)(:[0-9a-f.]{1,4}){0,4}",
    ) {
        settles::<DeviceId>(&text)?;
        settles::<devices::usb::UsbSelector>(&text)?;
        settles::<devices::usb::UsbSelector>(&usb)?;
        settles::<devices::id::Label>(&text)?;
        settles::<Size>(&text)?;
        settles::<Size>(&size)?;
        settles::<Millis>(&text)?;
        settles::<Millis>(&time)?;
        settles::<Mac>(&text)?;
        settles::<Mac>(&mac)?;
        settles::<Address>(&text)?;
        settles::<Address>(&address)?;
    }

    #[test]
    fn configs_come_back(device in configs::device()) {
        let json = serde_json::to_string(&device).expect("plain data");
        prop_assert_eq!(&serde_json::from_str::<DeviceConfig>(&json).expect("what was written"), &device);
        let toml = toml::to_string(&device).expect("plain data");
        prop_assert_eq!(&toml::from_str::<DeviceConfig>(&toml).expect("what was written"), &device, "{}", toml);
    }

    /// A config written as `key=value,...` is the config of the table.
    #[test]
    fn flags_are_tables(
        path in configs::path(), id in configs::id(), serial in "[a-z,=.]{1,12}", queues in 1_u16..9, errors in configs::on_error(),
    ) {
        let doubled = |text: &str| text.replace(',', ",,");
        let errors = serde_json::to_value(errors).expect("plain data");
        let words = errors.as_object().expect("a table").iter();
        let words: String = words.map(|(key, word)| format!(",on_error.{key}={}", word.as_str().expect("a word"))).collect();
        let flag = format!("id={id},path={},serial={},queues={queues}{words}", doubled(&path), doubled(&serial));
        let mut table = serde_json::json!({"id": id, "path": path, "serial": serial, "queues": queues});
        if !words.is_empty() {
            table["on_error"] = errors;
        }
        let parsed: devices::disk::DiskConfig = devices::keyval::parse(&flag).expect("it is well formed");
        prop_assert_eq!(parsed, serde_json::from_value(table).expect("a disk"));
    }
}
