//! Memory of a guest on huge pages.

use tests::lab::host::{HUGE_PAGES, read};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Vm};

fn free_pages() -> u64 {
    let text =
        read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").expect("the kernel has huge pages");
    text.trim().parse().expect("a number of pages")
}

#[test]
fn a_guest_on_huge_pages() {
    inside(|| {
        assert_eq!(free_pages(), HUGE_PAGES);
        let memory = "{ size = \"256MiB\", hugepages = \"2MiB\", prealloc = true }";
        let vm = Vm::with_memory(QemuVersion::V10_0, QUIET, 2, memory, AGENT_CHANNEL);
        let mut scene = step("boot", || Scene::of(vm));
        assert_eq!(free_pages(), HUGE_PAGES - 128, "256 MiB of 2 MiB each are taken");
        // The guest fills much of it.
        let script = "dd if=/dev/zero of=/tmp/fill bs=1M count=100 2>/dev/null && md5sum </tmp/fill";
        let sum = scene.guest.check(script).expect("the guest uses its memory");
        assert!(sum.starts_with("2f282b84e7e608d5852449ed940bfc51"), "{sum}");
        scene.end();
        assert_eq!(free_pages(), HUGE_PAGES, "all of it came back");
    });
}

#[test]
fn too_few_huge_pages_are_refused_by_name() {
    inside(|| {
        let memory = "{ size = \"1GiB\", hugepages = \"2MiB\", prealloc = true }";
        let vm = Vm::with_memory(QemuVersion::V10_0, QUIET, 2, memory, "");
        let output = vm.qvirt(&["start", &vm.config().display().to_string()]);
        println!("{output}");
        assert_eq!(output.code, 1, "{output}");
        for words in ["takes 512 huge pages of 2MiB", "has 200 left", "nr_hugepages"] {
            assert!(output.stderr.contains(words), "{words:?} is not in {output}");
        }
        vm.nothing_left();
    });
}
