//! The QMP commands of the fake, by name.

use std::os::fd::OwnedFd;

use serde_json::{Value, json};

use super::core::{Core, Outcome, Request};
use super::machine::text;
use super::{Effect, Failure};

impl Core {
    /// Runs one command. Errors: QEMU's.
    pub(super) fn execute(&mut self, request: &Request<'_>, fd: Option<OwnedFd>) -> Result<Outcome, Failure> {
        let (name, arguments) = (request.name, &request.arguments);
        if name.starts_with("fake-") {
            return self.own(name, arguments);
        }
        self.machine.qemu.check(name, arguments)?;
        let effects =
            |before: Vec<Effect>, after: Vec<Effect>| Ok(Outcome { before, reply: json!({}), after });
        match name {
            "cont" => effects(self.machine.cont(), Vec::new()),
            "stop" => effects(self.machine.stop("paused"), Vec::new()),
            "system_reset" => effects(self.machine.reset(), Vec::new()),
            "system_powerdown" => {
                let answers = self.machine.is_running() && !self.rules.ignores_powerdown();
                let off = Effect::Later(20, Core::shutdown(true, "guest-shutdown").into());
                let pressed = vec![Effect::event("POWERDOWN", Value::Null)];
                effects(pressed, if answers { vec![off] } else { Vec::new() })
            }
            "quit" => {
                let [event, end] = Core::shutdown(false, "host-qmp-quit");
                effects(vec![event], vec![end])
            }
            "device_del" => self.unplug(text(arguments, "id")),
            _ => {
                let reply = match self.query(name, request) {
                    Some(reply) => reply?,
                    None => self.change(request, fd)?,
                };
                Ok(Outcome { before: Vec::new(), reply, after: Vec::new() })
            }
        }
    }

    fn change(&mut self, request: &Request<'_>, fd: Option<OwnedFd>) -> Result<Value, Failure> {
        let (machine, arguments) = (&mut self.machine, &request.arguments);
        match request.name {
            "object-add" => machine.object_add(arguments),
            "object-del" => machine.object_del(text(arguments, "id")),
            "blockdev-add" => machine.blockdev_add(arguments),
            "blockdev-del" => machine.blockdev_del(text(arguments, "node-name")),
            "netdev_add" => machine.netdev_add(request.monitor, arguments),
            "netdev_del" => machine.netdev_del(text(arguments, "id")),
            "chardev-add" => {
                machine.chardev_add(text(arguments, "id"), arguments.get("backend").unwrap_or(&Value::Null))
            }
            "chardev-remove" => machine.chardev_remove(text(arguments, "id")),
            "device_add" => machine.device_add(arguments, true),
            "getfd" => machine.getfd(request.monitor, text(arguments, "fdname"), fd),
            "closefd" => machine.closefd(request.monitor, text(arguments, "fdname")),
            "add-fd" => machine.add_fd(arguments, fd),
            "remove-fd" => machine.remove_fd(arguments),
            other => Err(Failure::generic(format!("the fake QEMU knows `{other}` and does not play it"))),
        }
    }

    /// The reply of a command that changes nothing; `None` for any other.
    fn query(&self, name: &str, request: &Request<'_>) -> Option<Result<Value, Failure>> {
        let (machine, arguments) = (&self.machine, &request.arguments);
        let qemu = &machine.qemu;
        Some(Ok(match name {
            "query-version" => qemu.version.clone(),
            "query-qmp-schema" => match serde_json::from_str(qemu.schema.get()) {
                Ok(schema) => schema,
                Err(error) => return Some(Err(Failure::generic(error.to_string()))),
            },
            "query-machines" => qemu.machines.clone(),
            "query-commands" => qemu.commands().map(|name| json!({"name": name})).collect(),
            "qom-list-types" => {
                qemu.objects.iter().map(|name| json!({"name": name, "parent": "object"})).collect()
            }
            "device-list-properties" => {
                let kind = text(arguments, "typename");
                return Some(
                    qemu.devices.get(kind).map(|known| json!(known)).ok_or_else(|| Failure::absent(kind)),
                );
            }
            "query-status" => {
                // Members that 10.0 no longer has.
                let mut status = json!({"status": machine.run, "running": machine.is_running()});
                if !qemu.strict() {
                    status["singlestep"] = json!(false);
                }
                status
            }
            "query-name" => machine.name.as_ref().map_or_else(|| json!({}), |name| json!({"name": name})),
            "query-uuid" => json!({"UUID": machine.uuid}),
            "query-kvm" => json!({"enabled": false, "present": true}),
            "query-jobs" | "query-block-jobs" => json!([]),
            "query-iothreads" => {
                let threads =
                    machine.objects.iter().filter(|(_, props)| text(props, "qom-type") == "iothread");
                threads
                    .map(|(id, _)| json!({"id": id, "thread-id": std::process::id(), "poll-max-ns": 32768}))
                    .collect()
            }
            "query-cpus-fast" => json!([{
                "thread-id": std::process::id(), "cpu-index": 0, "target": "x86_64",
                "qom-path": "/machine/unattached/device[0]",
            }]),
            "query-chardev" => machine.chardevs(),
            "query-block" => machine.blocks(),
            "query-blockstats" => machine.block_stats(),
            "query-named-block-nodes" => machine.node_infos(),
            "query-fdsets" => machine.fdsets(),
            "query-pci" => machine.pci(),
            "qom-list" => return Some(machine.qom_list(text(arguments, "path"))),
            "qom-get" => return Some(machine.qom_get(text(arguments, "path"), text(arguments, "property"))),
            "human-monitor-command" => match text(arguments, "command-line") {
                "info network" => json!(machine.network()),
                other => json!(format!("unknown command: '{other}'\r\n")),
            },
            _ => return None,
        }))
    }
}
