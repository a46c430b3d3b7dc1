//! The fake's command line: the options that qvirt prints, JSON and `key=value` both. An option it does not know ends it, as it ends QEMU.

use serde_json::{Map, Value};

/// A monitor's end of its character device.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Monitor {
    /// The character device.
    pub(super) chardev: String,
    /// The inherited descriptor.
    pub(super) fd: i32,
    /// Whether it is a listener, or a connection already.
    pub(super) listens: bool,
}

/// A command line, read but not acted on.
#[derive(Debug, Default)]
pub(super) struct CommandLine {
    /// `-M none`: qvirt asks what this QEMU can do.
    pub(super) probing: bool,
    pub(super) name: Option<String>,
    pub(super) uuid: Option<String>,
    /// `-S`.
    pub(super) stopped: bool,
    pub(super) monitors: Vec<Monitor>,
    pub(super) chardevs: Vec<Map<String, Value>>,
    pub(super) objects: Vec<Map<String, Value>>,
    pub(super) blockdevs: Vec<Map<String, Value>>,
    pub(super) netdevs: Vec<Map<String, Value>>,
    pub(super) devices: Vec<Map<String, Value>>,
}

/// A JSON object, or `first,key=value,...` with commas in values doubled; `first` names the key of a leading bare word.
fn members(text: &str, first: &str) -> Result<Map<String, Value>, String> {
    if text.starts_with('{') {
        return serde_json::from_str(text).map_err(|error| format!("{text}: {error}"));
    }
    let mut members = Map::new();
    // A doubled comma stands for itself; no option holds the character that takes its place meanwhile.
    let parts = text.replace(",,", "\u{1}");
    for (index, part) in parts.split(',').enumerate() {
        let (key, value) =
            part.split_once('=').unwrap_or(if index == 0 { (first, part) } else { (part, "on") });
        members.insert(key.to_owned(), Value::from(value.replace('\u{1}', ",")));
    }
    Ok(members)
}

fn text<'a>(members: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    members.get(key).and_then(Value::as_str)
}

impl CommandLine {
    /// Reads the words after the program's name. Errors: what QEMU would say on its standard error.
    pub(super) fn parse(words: impl IntoIterator<Item = String>) -> Result<CommandLine, String> {
        let mut line = CommandLine::default();
        let mut words = words.into_iter();
        while let Some(option) = words.next() {
            // QEMU takes two dashes for one.
            let name = option.trim_start_matches('-');
            match name {
                "S" => line.stopped = true,
                "nodefaults" | "no-user-config" | "no-reboot" | "nographic" => {}
                _ => {
                    let value = words.next().ok_or_else(|| format!("{option}: requires an argument"))?;
                    line.option(name, &value)?;
                }
            }
        }
        line.connect_monitors()?;
        Ok(line)
    }

    fn option(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "M" | "machine" => {
                self.probing = members(value, "type")?.get("type") == Some(&Value::from("none"))
            }
            "name" => self.name = text(&members(value, "guest")?, "guest").map(str::to_owned),
            "uuid" => self.uuid = Some(value.to_owned()),
            "chardev" => self.chardevs.push(members(value, "backend")?),
            "object" => self.objects.push(members(value, "qom-type")?),
            "blockdev" => self.blockdevs.push(members(value, "driver")?),
            "netdev" => self.netdevs.push(members(value, "type")?),
            "device" => self.devices.push(members(value, "driver")?),
            "mon" => {
                let monitor = members(value, "chardev")?;
                let chardev = text(&monitor, "chardev").ok_or("-mon: chardev is missing")?.to_owned();
                self.monitors.push(Monitor { chardev, fd: -1, listens: false });
            }
            "accel" | "cpu" | "smp" | "m" | "display" | "sandbox" | "kernel" | "initrd" | "append" | "L"
            | "rtc" | "boot" | "global" | "msg" | "run-with" | "overcommit" | "fw_cfg" | "D" | "d"
            | "action" | "vga" => {}
            _ => return Err(format!("-{name}: invalid option")),
        }
        Ok(())
    }

    fn connect_monitors(&mut self) -> Result<(), String> {
        for monitor in &mut self.monitors {
            let id = &monitor.chardev;
            let found = self.chardevs.iter().find(|chardev| text(chardev, "id") == Some(id));
            let chardev = found.ok_or_else(|| format!("-mon chardev={id}: chardev \"{id}\" not found"))?;
            let fd = text(chardev, "fd").and_then(|fd| fd.parse().ok());
            monitor.fd =
                fd.ok_or_else(|| format!("-chardev {id}: the fake takes its monitors as descriptors"))?;
            monitor.listens = text(chardev, "server") == Some("on");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(words: &[&str]) -> Result<CommandLine, String> {
        CommandLine::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn a_command_line_is_read() {
        let line = parse(&[
            "-S",
            "-name",
            "guest=a,,b,debug-threads=on",
            "-chardev",
            "socket,id=qmp.0,fd=5,server=on,wait=off",
            "-mon",
            "chardev=qmp.0,mode=control",
            "-device",
            r#"{"driver":"x","id":"d"}"#,
            "-device",
            "x,id=e",
        ]);
        let line = line.expect("a command line");
        assert_eq!((line.name.as_deref(), line.stopped, line.probing), (Some("a,b"), true, false));
        assert_eq!(line.monitors, [Monitor { chardev: "qmp.0".to_owned(), fd: 5, listens: true }]);
        assert_eq!(json!(line.devices), json!([{"driver": "x", "id": "d"}, {"driver": "x", "id": "e"}]));
        assert_eq!(parse(&["-frobnicate", "1"]).expect_err("unknown"), "-frobnicate: invalid option");
    }
}
