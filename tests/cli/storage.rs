//! Storage that fails or hangs when a VM starts: it is named, in time, and nobody waits for it.

use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::scene::{bare, file, refused, start_paused};

/// How long a start may take to see it.
const IN_TIME: Duration = Duration::from_secs(10);

#[test]
fn an_image_that_cannot_be_read_is_named() {
    let vm = bare("[[disk]]\nid = \"data\"\npath = \"/proc/self/mem\"\n");
    let said = "image /proc/self/mem: reading it failed: Input/output error (os error 5); repair its storage, then try again";
    for command in ["check", "start", "run"] {
        refused(&vm, 2, &[command, &file(&vm)], &format!("config DIR/guest.toml, line 7: {said}"));
    }
    vm.nothing_left();

    let vm = bare("");
    start_paused(&vm);
    refused(&vm, 3, &["attach", "guest", "--disk", "path=/proc/self/mem,id=data"], said);
    vm.end();
}

/// A pipe that nobody writes into opens as storage that hangs does.
#[test]
fn a_file_that_hangs_is_named_in_time() {
    let vm = bare("[kernel]\npath = \"hangs\"\n");
    mkfifo(&vm.path("hangs"), Mode::S_IRWXU).expect("a pipe is made");
    let said = "config DIR/guest.toml, line 1: kernel file DIR/hangs cannot be opened: DIR/hangs: reading it has no answer after 5s: repair its \
                storage, then try again; check `path` and `initrd` of [kernel]";
    for command in ["check", "start"] {
        let begin = Instant::now();
        refused(&vm, 2, &[command, &file(&vm)], said);
        assert!(begin.elapsed() < IN_TIME, "{command}: {:?}", begin.elapsed());
    }
    vm.nothing_left();
}
