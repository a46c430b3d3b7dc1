"""PyPI's qemu.qmp against the owner's control socket, as it would be used against QEMU itself. Any surprise ends it with a traceback."""

import asyncio
import sys

from qemu.qmp import ExecuteError, EventListener, QMPClient


async def main(path: str, image: str) -> None:
    one, two = QMPClient("one"), QMPClient("two")
    await one.connect(path)
    await two.connect(path)
    with one.listener(["RESUME", "STOP"]) as heard, two.listener(["QVIRT_DEVICE_ATTACHED", "QVIRT_DEVICE_DETACHED"]) as seen:
        assert one.greeting is not None and one.greeting.QMP.version["qemu"]["major"] == 10
        assert (await one.execute("query-status"))["status"] == "prelaunch"
        await two.execute("cont")
        assert (await asyncio.wait_for(heard.get(), 20))["event"] == "RESUME"
        await two.execute("stop")
        assert (await asyncio.wait_for(heard.get(), 20))["event"] == "STOP"

        # Two clients at once, each with its own ids.
        names = await asyncio.gather(*(client.execute("query-name") for client in (one, two) for _ in range(50)))
        assert all(name == {"name": "guest"} for name in names)

        names = {command["name"] for command in await one.execute("query-commands")}
        assert {"query-block", "qvirt-attach", "qvirt-status"} <= names
        device = {"disk": {"path": image, "id": "a", "bus": "virtio-scsi"}}
        attached = await one.execute("qvirt-attach", {"device": device})
        assert attached["label"] == "sda", attached
        event = await asyncio.wait_for(seen.get(), 20)
        assert event["event"] == "QVIRT_DEVICE_ATTACHED" and event["data"]["device"] == "a", event
        detached = await two.execute("qvirt-detach", {"id": "a", "wait-ms": 20000})
        assert detached == {"outcome": "removed", "id": "a"}, detached
        event = await asyncio.wait_for(seen.get(), 20)
        assert event["event"] == "QVIRT_DEVICE_DETACHED", event

        for command, arguments, error in [
            ("no-such-command", {}, "CommandNotFound"),
            ("device_del", {"id": "s0"}, "QvirtRefused"),
            ("qvirt-detach", {"id": "nothing"}, "DeviceNotFound"),
        ]:
            try:
                await one.execute(command, arguments)
            except ExecuteError as refusal:
                assert refusal.error_class == error, refusal
            else:
                raise AssertionError(f"{command} succeeded")
    await one.disconnect()
    # One has gone, the other goes on.
    assert (await two.execute("query-status"))["status"] == "paused"
    await two.disconnect()
    print("done")


asyncio.run(main(*sys.argv[1:]))
