//! Media of CD-ROM drives, put in and taken out while the guest reads them.

use serde_json::{Value, json};
use tests::guest::SCRIPT;
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Output};

on_one! { 10.0:
    changed => media_that_change,
}

fn media(scene: &Scene, words: &[&str]) -> Output {
    let output = scene.vm.qvirt(&[&["media", "guest", "cd0"], words].concat());
    println!("$ qvirt media guest cd0 {}\n{output}", words.join(" "));
    output
}

fn insert(scene: &mut Scene, image: &str, text: &str) {
    let output = media(scene, &["insert", image]);
    assert_eq!(output.code, 0, "{output}");
    let read = format!("dd if=/dev/sr0 bs=2048 count=1 2>/dev/null | head -c {}", text.len());
    assert_eq!(scene.guest.check(&read).expect("the guest reads the disc"), text);
    assert_eq!(scene.vm.device("cd0")["backing"], image);
    is_whole(scene, Some(image));
}

/// Nothing is left of former media: no node, no lease.
fn is_whole(scene: &Scene, image: Option<&str>) {
    let nodes = scene.vm.qmp("query-named-block-nodes", &json!({}));
    let of_drive = |node: &&Value| node["node-name"].as_str().is_some_and(|name| name.starts_with("cd0-"));
    let nodes: Vec<&Value> = nodes.as_array().into_iter().flatten().filter(of_drive).collect();
    assert_eq!(nodes.len(), if image.is_some() { 2 } else { 0 }, "{nodes:#?}");
    assert!(nodes.iter().all(|node| node["file"].as_str() == image), "{nodes:#?}");
    assert_eq!(scene.vm.leases().len(), image.iter().count());
}

fn media_that_change(version: QemuVersion) {
    let drive = "[[disk]]\nid = \"cd0\"\ndevice = \"cdrom\"\n";
    let mut scene = Scene::boot(version, QUIET, &format!("{AGENT_CHANNEL}{drive}"));
    let (first, second) = (scene.vm.raw("a.iso", 2, "FIRST"), scene.vm.raw("b.iso", 4, "SECOND"));
    insert(&mut scene, &first, "FIRST");
    insert(&mut scene, &second, "SECOND");
    assert_eq!(media(&scene, &["eject"]).code, 0);
    scene.sees_line("an empty drive", "cdrom", "media=none");
    is_whole(&scene, None);
    insert(&mut scene, &first, "FIRST");

    // A guest that uses the disc is asked, and keeps it unless it is not asked.
    let mut reader = scene.guest.begin("exec 3</dev/sr0; echo open; sleep 1000").expect("a script");
    scene.guest.wait_output(&mut reader, "open", SCRIPT).expect("it opens the drive");
    for words in [&["eject"][..], &["insert", &second]] {
        let output = media(&scene, words);
        let said = "medium of cd0: the guest has locked the drive and keeps its medium";
        assert!(output.code == 3 && output.stderr.contains(said), "{output}");
        is_whole(&scene, Some(&first));
    }
    assert_eq!(media(&scene, &["eject", "--force"]).code, 0);
    is_whole(&scene, None);
    scene.guest.kill(&reader).expect("the reader ends");

    // Another owner knows what is in the drive.
    insert(&mut scene, &second, "SECOND");
    scene.vm.kill_owner();
    scene.vm.start();
    assert_eq!(scene.vm.device("cd0")["backing"], second.as_str());
    insert(&mut scene, &first, "FIRST");
    scene.end();
}
