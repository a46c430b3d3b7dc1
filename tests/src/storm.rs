//! A disk of a guest that writes, reads and verifies a pattern on it all the time, while its storage fails: by a drill, or really.

use serde_json::Value;

use crate::guest::{PatternReport, PatternWish};
use crate::scene::Scene;

/// A disk on which a pattern runs.
pub struct Storm {
    /// Its id and serial number.
    pub id: String,
    /// The guest's node of it.
    pub name: String,
}

impl Storm {
    /// Attaches a disk of 4 MiB that retries every 200 ms, on a new raw image, and begins.
    pub fn begin(scene: &mut Scene, id: &str, more: &str) -> Storm {
        let image = scene.vm.raw(&format!("{id}.img"), 4, "x");
        Storm::on(scene, id, &format!("path={image},{more}"))
    }

    /// The same on an image that `more` names by `path=`.
    pub fn on(scene: &mut Scene, id: &str, more: &str) -> Storm {
        Storm::attach(scene, id, more);
        Storm::of_disk(scene, id)
    }

    /// Attaches it and leaves it alone: whatever uses the disk is up to the test.
    pub fn calm(scene: &mut Scene, id: &str, more: &str) -> Storm {
        let image = scene.vm.raw(&format!("{id}.img"), 4, "x");
        Storm::calm_on(scene, id, &format!("path={image},{more}"))
    }

    /// The same on an image that `more` names by `path=`.
    pub fn calm_on(scene: &mut Scene, id: &str, more: &str) -> Storm {
        Storm::attach(scene, id, more);
        Storm { id: id.to_owned(), name: format!("/dev/{}", scene.disk(id)) }
    }

    fn attach(scene: &mut Scene, id: &str, more: &str) {
        let retry = "on_error.read=retry,on_error.write=retry,on_error.interval=200ms";
        scene.attach(
            ["--disk", &format!("id={id},serial={id},{retry},{more}")],
            "disk",
            &format!("serial={id}"),
        );
    }

    /// Begins on a disk that the guest has, by its serial number, which is its id.
    pub fn of_disk(scene: &mut Scene, id: &str) -> Storm {
        let name = format!("/dev/{}", scene.disk(id));
        scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
        let storm = Storm { id: id.to_owned(), name };
        storm.goes_on(scene, "at the start");
        storm
    }

    /// What the pattern did up to now.
    pub fn report(&self, scene: &mut Scene) -> PatternReport {
        scene.guest.pattern_report(&self.name).expect("a report")
    }

    /// Waits until the pattern has verified more blocks.
    pub fn goes_on(&self, scene: &mut Scene, when: &str) -> PatternReport {
        let before = self.report(scene).verified;
        let more = |report: &PatternReport| report.verified > before + 20;
        scene
            .guest
            .wait_pattern(&self.name, &format!("pattern that goes on {when}"), more)
            .expect("it goes on")
    }

    /// The same, and the guest has seen no error in all that time.
    pub fn is_unharmed(&self, scene: &mut Scene, when: &str) -> PatternReport {
        let report = self.goes_on(scene, when);
        assert_eq!(
            (report.error_count, report.mismatch_count),
            (0, 0),
            "{when}: {report:#?}\n{}",
            scene.vm.owner_log()
        );
        report
    }

    /// `io` of its status.
    pub fn io(&self, scene: &Scene) -> Value {
        scene.vm.device(&self.id)["io"].clone()
    }

    /// One of its counters.
    pub fn count(&self, scene: &Scene, counter: &str) -> u64 {
        self.io(scene)["counters"][counter].as_u64().expect("a count")
    }

    /// A drill, to its end.
    pub fn drill(&self, scene: &Scene, fail_for: &str, more: &[&str]) -> String {
        println!("$ qvirt drill guest {} --fail-for {fail_for} {}", self.id, more.join(" "));
        let text = scene.vm.ok(&[&["drill", "guest", &self.id, "--fail-for", fail_for], more].concat());
        print!("{text}");
        text
    }

    /// Drills until something failed: a guest that is slow may not use its disk in so short a time.
    pub fn drill_felt(&self, scene: &Scene, fail_for: &str, more: &[&str]) {
        let before = self.count(scene, "suspensions");
        let felt = (0..5).any(|_| {
            self.drill(scene, fail_for, more);
            self.count(scene, "suspensions") > before
        });
        assert!(felt, "{more:?}: nothing failed: {}", self.io(scene));
    }

    /// A drill that goes on by itself.
    pub fn fail_for(&self, scene: &Scene, milliseconds: u64) {
        let arguments = serde_json::json!({
            "id": self.id, "fail-for-ms": milliseconds, "reads": true, "writes": true, "flushes": true,
        });
        scene.vm.qmp("qvirt-drill", &arguments);
    }

    /// Waits until its state is that.
    pub fn waits_for(&self, scene: &Scene, state: &str) {
        scene.vm.wait_for(&format!("disk {} to be {state}", self.id), || self.io(scene)["state"] == state);
    }

    /// Ends the pattern, looks at what it left, and detaches the disk.
    pub fn detach(self, scene: &mut Scene) {
        scene.guest.pattern_stop(&self.name).expect("the pattern ends");
        let verdict = scene.guest.pattern_verify(&self.name).expect("a verdict");
        assert_eq!((verdict.mismatch_count, verdict.stale), (0, 0), "{verdict:#?}");
        print!("{}", scene.vm.ok(&["detach", "guest", &self.id, "--wait", "30s"]));
    }

    /// The process that serves its disk.
    pub fn proxy(&self, scene: &Scene) -> Option<i32> {
        let name = format!("--name {} ", self.id);
        scene.vm.proxies().into_iter().find(|(_, words)| words.contains(&name)).map(|(pid, _)| pid)
    }

    /// Detaches its disk; nothing is left of its proxy.
    pub fn leaves(self, scene: &mut Scene) {
        let (id, proxy) = (self.id.clone(), self.proxy(scene).expect("a proxy"));
        self.detach(scene);
        assert!(!scene.vm.processes().contains(&proxy), "the proxy goes with its disk");
        let run = std::fs::read_dir(scene.vm.root().join("run/guest")).expect("a folder").flatten();
        let left: Vec<_> =
            run.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains(&id)).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}
