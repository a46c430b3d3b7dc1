//! What commands print: tables for people, JSON for programs.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::units::Size;
use serde::Serialize;

use crate::record::Stage;
use crate::status::{DeviceStatus, IoState, IoStatus, Status, UsbState};
use crate::suspend::state::unix_ms;

/// A VM in a list.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub state: String,
    pub stored: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// Prints a value as JSON, indented.
pub fn json(value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout().lock(), "{text}")
}

/// Prints columns as wide as they must be.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = io::stdout().lock();
    let mut line = |cells: Vec<&str>| {
        let cells: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())
    };
    line(head.to_vec())?;
    rows.iter().try_for_each(|row| line(row.iter().map(String::as_str).collect()))
}

/// `qvirt list`
pub fn list(rows: &[Row], as_json: bool) -> io::Result<()> {
    if as_json {
        return json(&rows);
    }
    let cells = |row: &Row| {
        let pid = row.status.as_ref().map_or_else(|| "-".to_owned(), |s| s.pid.to_string());
        let uptime = row.status.as_ref().map_or_else(|| "-".to_owned(), |s| uptime(s.since_unix_secs));
        vec![
            row.name.clone(),
            row.state.clone(),
            pid,
            uptime,
            if row.stored { "yes" } else { "no" }.to_owned(),
        ]
    };
    table(&["NAME", "STATE", "PID", "UPTIME", "STORED"], &rows.iter().map(cells).collect::<Vec<_>>())
}

/// `qvirt status`
pub fn status(status: &Status) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "name:     {}", status.vm)?;
    writeln!(out, "state:    {}", status.run)?;
    writeln!(out, "uptime:   {}", uptime(status.since_unix_secs))?;
    writeln!(out, "pid:      {} (owner {})", status.pid, status.owner_pid)?;
    writeln!(out, "uuid:     {}", status.uuid)?;
    writeln!(out, "qemu:     {}", status.qemu)?;
    writeln!(out, "accel:    {}", status.accel)?;
    let count = |stage: Stage| status.devices.iter().filter(|d| d.stage == stage).count();
    let (arriving, leaving) = (count(Stage::Arriving), count(Stage::Leaving));
    let moving = match (arriving, leaving) {
        (0, 0) => String::new(),
        (arriving, leaving) => format!(" ({arriving} arriving, {leaving} leaving)"),
    };
    writeln!(out, "devices:  {}{moving}", status.devices.len())?;
    for device in &status.devices {
        if let Some(retry) = &device.on_error {
            writeln!(out, "on_error: {}: {retry}", device.name())?;
        }
    }
    for device in &status.devices {
        let Some(fault) = &device.fault else { continue };
        let io_status = fault.io_status.as_deref().unwrap_or("unknown");
        writeln!(
            out,
            "fault:    {}: {} of {} failed: {} (action {}, {} events, io-status {io_status})",
            device.name(),
            fault.operation,
            fault.node,
            fault.cause,
            fault.action,
            fault.events,
        )?;
    }
    for device in &status.devices {
        let Some(io) = device.io.as_ref().filter(|io| io.state != IoState::Ok) else { continue };
        writeln!(out, "i/o:      {}: {}", device.name(), io_words(io))?;
    }
    status.warnings.iter().try_for_each(|warning| writeln!(out, "warning:  {warning}"))
}

/// A VM's state in a few words, with the disks whose storage does not work.
pub fn state(status: &Status) -> String {
    let disks = status.devices.iter().filter_map(|device| Some((device, device.io.as_ref()?)));
    let troubled = disks.filter(|(_, io)| io.state != IoState::Ok);
    let words = troubled.map(|(device, io)| format!("; {}: {}", device.name(), io.state));
    std::iter::once(status.run.to_string()).chain(words).collect()
}

/// `qvirt io status`
pub fn io(disks: &[&DeviceStatus]) -> io::Result<()> {
    let cells = |disk: &&DeviceStatus| {
        let io = disk.io.as_ref()?;
        let counters = io.counters;
        let counts =
            [counters.suspensions, counters.retries, counters.recoveries, counters.timeouts, counters.hangs];
        let mut row = vec![disk.id.clone(), disk.label.clone().unwrap_or_else(|| "-".to_owned())];
        row.extend([disk.on_error.as_ref()?.engine.to_string(), io_words(io)]);
        row.extend(counts.map(|count| count.to_string()));
        Some(row)
    };
    let head = ["ID", "TARGET", "ENGINE", "STATE", "OUTAGES", "RETRIES", "RECOVERED", "TIMED-OUT", "HANGS"];
    table(&head, &disks.iter().filter_map(cells).collect::<Vec<_>>())
}

/// Where a disk stands, in words.
pub fn io_words(io: &IoStatus) -> String {
    let Some(outage) = &io.outage else { return io.state.to_string() };
    let state = match io.state {
        IoState::Hung => "hangs, suspended".to_owned(),
        state => state.to_string(),
    };
    let cause = match outage.cause.as_str() {
        // QEMU has not said yet: 10.0 sends one event a second.
        "" => "an error".to_owned(),
        cause => format!("{}: {cause}", outage.operation),
    };
    let since = unix_ms().saturating_sub(outage.since_unix_ms) / 1000;
    let action = outage.at_timeout.map(|action| format!(", at the timeout: {action}")).unwrap_or_default();
    format!("{state} for {since}s, {} attempts, {} requests held{action} ({cause})", outage.attempts, io.held)
}

/// `qvirt devices`
pub fn devices(status: &Status) -> io::Result<()> {
    let cells = |d: &DeviceStatus| {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let stage = match d.stage {
            Stage::Arriving => "arriving",
            Stage::Present if d.fault.is_some() => "present, I/O errors",
            Stage::Present => "present",
            Stage::Leaving => "leaving",
        };
        let stage = match d.usb.as_ref().filter(|usb| usb.state != UsbState::Attached) {
            Some(usb) => format!("{stage}, {}", usb.state),
            None => stage.to_owned(),
        };
        let behind = d.pty.clone().or_else(|| d.backing.clone());
        vec![
            d.id.clone(),
            d.kind.clone(),
            text(&d.label),
            text(&d.address),
            text(&d.driver),
            stage,
            size(d),
            text(&behind),
        ]
    };
    let mut rows: Vec<Vec<String>> = status.devices.iter().map(cells).collect();
    for foreign in &status.foreign {
        let address = foreign.address.clone().unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            foreign.name.clone(),
            "foreign".into(),
            "-".into(),
            address,
            "-".into(),
            "present".into(),
            "-".into(),
            "-".into(),
        ]);
    }
    table(&["ID", "KIND", "TARGET", "SEAT", "DRIVER", "STATE", "SIZE", "BEHIND"], &rows)?;
    let mut out = io::stdout().lock();
    writeln!(out)?;
    for seats in &status.seats {
        writeln!(out, "{}: {} of {} free", seats.kind, seats.free, seats.total)?;
    }
    drop(out);
    status.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    Ok(())
}

/// A disk's capacity; a question mark says that it was so when its storage still worked.
fn size(device: &DeviceStatus) -> String {
    let Some(bytes) = device.size_bytes else { return "-".to_owned() };
    format!("{}{}", Size::bytes(bytes), if device.size_stale { "?" } else { "" })
}

/// Days, hours, minutes and seconds since then.
fn uptime(since_unix_secs: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = now.saturating_sub(since_unix_secs);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m {}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h {minutes}m"),
        (days, hours, _) => format!("{days}d {hours}h"),
    }
}
