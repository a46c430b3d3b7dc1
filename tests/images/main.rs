//! What makes the images, where it cannot: each test runs a copy of `integration-images` in a folder of its own, with something spoilt.
//!
//! Their lock files name one small package of the real one, so that nothing big is downloaded before the error is found.

mod copy;

use copy::{Copy, Output, netbase};

/// A lock of the part qemu-7.2 alone, of these lines, and a file `packages` that wishes for no other.
fn locked(lines: &str) -> Copy {
    let copy = Copy::new();
    copy.write("packages", "[qemu-7.2]\n");
    copy.write("packages.lock", &format!("[qemu-7.2]\n{lines}"));
    copy
}

/// Fails with that text, and leaves no part and nothing half-made.
#[track_caller]
fn is_refusal(copy: &Copy, output: &Output, error: &str) {
    assert_eq!(output.code, 1, "{output}");
    assert!(
        output.stderr.ends_with(&format!("images: error: {error}\n")),
        "{output}\nexpected at its end:\n{error}"
    );
    assert_eq!(output.stdout, "", "{output}");
    assert_eq!(copy.left(), [""; 0], "{output}");
}

#[test]
fn no_lock_file() {
    let copy = Copy::new();
    copy.remove("packages.lock");
    let error = "DIR/integration-images/packages.lock is missing, it names the packages that the images are made of: take it from the \
                 repository (git checkout), or write it anew by make lock";
    is_refusal(&copy, &copy.run("setup", &[]), error);
}

#[test]
fn a_part_that_is_not_locked() {
    let copy = Copy::new();
    copy.edit("packages", "[lab-root]", "[lab-branch]\nwant nothing\n\n[lab-root]");
    let error = "DIR/integration-images/packages.lock has no packages for the part lab-branch, which the file packages names: take both \
                 from the repository (git checkout), or run make lock";
    is_refusal(&copy, &copy.run("setup", &[]), error);
}

#[test]
fn a_line_that_is_none() {
    let copy = locked("netbase 6.4 main\n");
    let error = "DIR/integration-images/packages.lock has a line that is none, \"netbase 6.4\" of qemu-7.2: take it from the repository, \
                 or write it anew by make lock";
    is_refusal(&copy, &copy.run("setup", &[]), error);
}

#[test]
fn versions_that_the_archive_no_longer_has() {
    let real = netbase();
    let gone = |version: &str| real.line().replace(real.version, version);
    let copy = locked(&format!("{}{}{}", gone("0.2"), real.line(), gone("0.1")));
    let error = "the archive moved on and no longer has:\n    netbase 0.1\n    netbase 0.2\n\
                 Run make lock to move to the newest versions, then run this again";
    is_refusal(&copy, &copy.run("setup", &[]), error);
}

#[test]
fn a_changed_checksum() {
    let real = netbase();
    let wrong = "0123456789abcdef".repeat(4);
    let copy = locked(&real.line().replace(real.sum, &wrong));
    let error = format!(
        "packages with another checksum than DIR/integration-images/packages.lock has; they were not used and are removed:\n    \
         netbase {}: locked is {wrong} ({} bytes), the archive gave {} ({} bytes)\n\
         Look at who changed the lock file or the archive; if that was meant: make lock",
        real.version, real.bytes, real.sum, real.bytes
    );
    is_refusal(&copy, &copy.run("setup", &[]), &error);
}

#[test]
fn two_checksums_for_one_package() {
    let real = netbase();
    let copy = locked(&(real.line() + &real.line().replace(real.sum, &"0".repeat(64))));
    let error = format!(
        "DIR/integration-images/packages.lock has two checksums for netbase {}: take it from the repository, or write it anew by make lock",
        real.version
    );
    is_refusal(&copy, &copy.run("setup", &[]), &error);
}

#[test]
fn sources_without_the_suite() {
    let copy = locked(&netbase().line());
    copy.write("sources/other.list", "deb http://localhost:1/debian trixie main\n");
    let config = copy.apt_config(
        "Dir::Etc::sourcelist \"DIR/none\"; Dir::Etc::sourceparts \"DIR/integration-images/sources\";",
    );
    let error = "apt has no source with the suite bookworm; the images are made of Debian 12 packages: add \"deb URI bookworm main\" to \
                 /etc/apt/sources.list";
    is_refusal(&copy, &copy.run("setup", &[("APT_CONFIG", &config)]), error);
    let output = copy.run("lock", &[("APT_CONFIG", &config)]);
    is_refusal(&copy, &output, error);
}

/// That nothing answers is no sign that a version is gone.
#[test]
fn an_archive_out_of_reach() {
    let real = netbase();
    let copy = locked(&real.line());
    // The system's own configuration would come after this one, and win.
    let config = copy.apt_config(
        "Dir::Etc::main \"DIR/none\"; Dir::Etc::parts \"DIR/none\"; Acquire::http::Proxy \"http://127.0.0.1:1\"; \
         Acquire::https::Proxy \"http://127.0.0.1:1\";",
    );
    let output = copy.run("setup", &[("APT_CONFIG", &config)]);
    let error = format!(
        "packages could not be downloaded (1 in all):\n    netbase {}: Could not connect to 127.0.0.1:1 (127.0.0.1). - connect (111: \
         Connection refused)\nCheck the network, the proxy and the sources in /etc/apt, then run this again",
        real.version
    );
    is_refusal(&copy, &output, &error);
}

#[test]
fn a_python_package_with_a_changed_checksum() {
    let copy = Copy::new();
    copy.write("packages", "");
    let pins = copy.read("requirements.lock");
    let sum = pins.trim_end().rsplit(':').next().expect("a pin ends with its checksum");
    copy.edit("requirements.lock", sum, &"0".repeat(64));
    let output = copy.run("setup", &[]);
    assert_eq!(output.code, 1, "{output}");
    let error = "images: error: a Python package has another checksum than DIR/integration-images/requirements.lock has, and was not used:";
    assert!(output.stderr.contains(error) && output.stderr.contains(sum), "{output}");
    assert_eq!(copy.left(), [""; 0], "{output}");
}

/// The disk is looked at before anything else is, so a wish for more than any disk has is as good as a full one.
#[test]
fn no_space() {
    let real = netbase();
    let copy = locked(&real.line().replace(&format!(" {} ", real.bytes), " 9000000000000000 "));
    let output = copy.run("setup", &[("PATH", &copy.path_of_coreutils())]);
    assert_eq!(output.code, 1, "{output}");
    let (before, after) =
        output.stderr.split_once(" MiB are free for DIR/target/images, ").expect(&output.stderr);
    assert!(before.starts_with("images: error: only ") && before.lines().count() == 1, "{output}");
    assert!(
        after.ends_with(" MiB are needed: free some space, or make target a link to a bigger disk\n"),
        "{output}"
    );
    assert!(!copy.path("target").exists(), "{output}");
}

/// What was just locked is the newest; what is wished for no longer is told, and gone.
#[test]
fn locking_twice() {
    let copy = Copy::new();
    copy.write("packages", "[lab-root]\nwant bash\nonly base*\n");
    let first = copy.run("lock", &[]);
    assert_eq!(first.code, 0, "{first}");
    assert!(
        first.stdout.lines().any(|line| line.starts_with("lab-root: bash ") && line.ends_with(" -> (gone)")),
        "{first}"
    );
    let locks = || (copy.read("packages.lock"), copy.read("requirements.lock"));
    let (packages, requirements) = locks();
    assert!(packages.contains("\n[lab-root]\nbase-files "), "{packages}");
    let second = copy.run("lock", &[]);
    assert_eq!((second.code, second.stdout.as_str()), (0, ""), "{second}");
    assert_eq!(locks(), (packages, requirements));
    assert_eq!(copy.left(), [""; 0], "{second}");
}

/// A lock file that cannot be made anew stays as it was.
#[test]
fn locking_what_does_not_exist() {
    let copy = Copy::new();
    let before = copy.read("packages.lock");
    copy.write("packages", "[lab-root]\nwant no-such-package\n");
    let output = copy.run("lock", &[]);
    let error = "apt cannot resolve the part lab-root (its message is above): mend its section in DIR/integration-images/packages";
    is_refusal(&copy, &output, error);
    assert!(output.stderr.contains("E: Unable to locate package no-such-package"), "{output}");
    assert_eq!(copy.read("packages.lock"), before);
}
