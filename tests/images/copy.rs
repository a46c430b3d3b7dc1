//! A copy of `integration-images`, and what its programs say.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The repository.
fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository")
}

/// A line of the real lock file: of a package that is small, and in every release.
pub struct Locked {
    pub version: &'static str,
    pub bytes: &'static str,
    pub sum: &'static str,
    line: &'static str,
}

impl Locked {
    /// With its newline.
    pub fn line(&self) -> String {
        format!("{}\n", self.line)
    }
}

/// The package netbase as it is locked.
pub fn netbase() -> Locked {
    static LOCK: OnceLock<String> = OnceLock::new();
    let path = repository().join("integration-images/packages.lock");
    let lock = LOCK.get_or_init(|| fs::read_to_string(path).expect("the lock file"));
    let line = lock.lines().find(|line| line.starts_with("netbase ")).expect("netbase is locked");
    let words: Vec<&str> = line.split(' ').collect();
    let [_, version, _, _, bytes, sum] = words[..] else { panic!("{line:?} has not six words") };
    Locked { version, bytes, sum, line }
}

/// A copy of `integration-images` in a folder of its own, without what was made.
pub struct Copy(tempfile::TempDir);

impl Copy {
    pub fn new() -> Copy {
        let copy = Copy(tempfile::tempdir().expect("a folder"));
        copy_folder(&repository().join("integration-images"), &copy.path("integration-images"));
        copy
    }

    /// A path in the folder that stands for the repository.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path("integration-images").join(name)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).expect(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        let file = self.file(name);
        fs::create_dir_all(file.parent().expect("a file is in a folder")).expect(name);
        fs::write(file, text).expect(name);
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).expect(name);
    }

    /// Replaces a part of a file, which must be there.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{from:?} is not in {text}");
        self.write(name, &text.replace(from, to));
    }

    /// A file for apt's variable APT_CONFIG; `DIR` in it is this copy's folder, in which `none` is an empty one.
    pub fn apt_config(&self, text: &str) -> String {
        fs::create_dir_all(self.path("none")).expect("made");
        self.write("apt.conf", &text.replace("DIR", &self.path("").display().to_string()));
        self.file("apt.conf").display().to_string()
    }

    /// A folder that, as PATH, has the tools that every system has, and neither apt nor Python.
    pub fn path_of_coreutils(&self) -> String {
        let folder = self.path("bin");
        fs::create_dir(&folder).expect("made");
        for tool in ["bash", "env", "cat", "dirname", "basename", "df", "tail", "tr", "sha256sum", "cut"] {
            std::os::unix::fs::symlink(format!("/usr/bin/{tool}"), folder.join(tool)).expect(tool);
        }
        folder.display().to_string()
    }

    /// Runs one of its programs to the end.
    pub fn run(&self, program: &str, environment: &[(&str, &str)]) -> Output {
        let mut command = Command::new(self.file(program));
        let output = command
            .current_dir(self.0.path())
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .output()
            .expect("it starts");
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes).replace(&self.0.path().display().to_string(), "DIR")
        };
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// What lies in `target/images` beside the lock that runs wait for and whole packages, in which the next run is spared the way.
    pub fn left(&self) -> Vec<String> {
        let names = |folder: PathBuf| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
        };
        let images = self.path("target/images");
        let mut left = names(images.join(".downloads"));
        left.retain(|name| !name.ends_with(".deb"));
        left.extend(names(images).into_iter().filter(|name| name != ".lock" && name != ".downloads"));
        left
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            // With its permissions.
            fs::copy(&path, target).expect("copied");
        }
    }
}

/// What a program said, with `DIR` for the copy's folder.
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "it ended with {}\n--- stdout\n{}--- stderr\n{}", self.code, self.stdout, self.stderr)
    }
}
