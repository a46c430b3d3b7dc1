//! Starting a VM, step by step, with undo; and clearing up what a VM had on the host when it is over.
//!
//! journal, host steps -> listeners bound by us and passed on, so connecting cannot race -> spawn -> negotiate -> agree with QEMU. Any failure
//! kills, reaps, undoes, and carries the last lines of QEMU's log.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::host::{Access, HostNeed};
use devices::spec::Numbers;
use devices::{DeviceId, Placed};
use nix::sys::signal::Signal;
use qmp_client::{ConnectError, Events, Options, Qmp};
use serde_json::Value;
use thiserror::Error;
use tracing::{info, warn};

use crate::blueprint::Blueprint;
use crate::folders::{Folders, FoldersError, VmFiles, VmName, make_private};
use crate::host::need::{Host, NeedError};
use crate::host::pages::{self, PagesError};
use crate::injection::{Injected, Steps};
use crate::journal::{Journal, JournalError};
use crate::lease::{LeaseError, Leases};
use crate::locks::{LockError, OfdLock, probe};
use crate::owner::Born;
use crate::process::{Memlock, Process, ProcessError, Spawn, SpawnError, last_lines};
use crate::record::{Entry, FORMAT, Launch, RecordError, Stage};
use crate::work::{StepError, Workshop};
use crate::{quirks, users};

/// A step of a launch that failed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum Cause {
    #[error(transparent)]
    Folders(#[from] FoldersError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("VM {vm} is running already, with an owner: `qvirt status {vm}` shows it")]
    Owned { vm: VmName },
    #[error("VM {vm} is running already, without an owner: `qvirt run {vm}` adopts it")]
    Alive { vm: VmName },
    #[error("VM {vm} is dead and left something: `qvirt recover {vm}` clears up, then start it again")]
    Remains { vm: VmName },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Pages(#[from] PagesError),
    #[error("device {id}: {}", crate::request::chain(.source))]
    Need { id: DeviceId, source: NeedError },
    #[error("QMP listener {}: {source}", path.display())]
    Listen { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("QEMU {exit} before it could be asked anything")]
    Died { exit: String },
    #[error("QEMU's monitor")]
    Connect(#[from] ConnectError),
    #[error("QMP socket {}: {source}", path.display())]
    Socket { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Ask(#[from] StepError),
    #[error("QEMU started without device {id}, and did not say why: this is a bug of qvirt or QEMU")]
    Missing { id: DeviceId },
    #[error("the process has UUID {found}, not {expected}: it is not this VM's QEMU")]
    Stranger { found: String, expected: String },
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// A launch that failed; nothing is left of it.
#[derive(Debug, Error)]
#[error("VM {vm} did not start: {}{}", crate::request::chain(.cause), words(.last_words))]
pub struct LaunchError {
    /// The VM.
    pub vm: VmName,
    /// What failed.
    #[source]
    pub cause: Cause,
    /// The last lines of QEMU's log.
    pub last_words: String,
}

fn words(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!("\nQEMU's last words:\n{last}") }
}

/// Names of the steps of a launch, in order; those of devices come once for each.
pub const STEPS: &[&str] = &[
    "folder",
    "owner-lock",
    "life-lock",
    "journal",
    "firmware",
    "record",
    "need",
    "listen",
    "save",
    "spawn",
    "identity",
    "connect",
    "agree",
];

/// How long QEMU may take to greet: it has opened all images and made all devices by then.
const GREETING: Duration = Duration::from_secs(60);

/// What was done so far, and so what is to be undone.
struct Launching<'a> {
    vm: &'a VmName,
    files: VmFiles,
    log: PathBuf,
    steps: Steps,
    owner_lock: Option<OfdLock>,
    life: Option<OfdLock>,
    journal: Option<Journal<Entry>>,
    host: Option<Arc<Host>>,
    process: Option<Process>,
}

/// The folder that the VM's logs live in: it outlives the boot.
pub fn log_file(folders: &Folders, vm: &VmName) -> PathBuf {
    folders.state_dir(vm).join("qemu.log")
}

/// Starts a VM. The guest does not run yet.
pub async fn launch(blueprint: Blueprint, folders: &Folders, paused: bool) -> Result<Born, LaunchError> {
    let vm = blueprint.config.name.clone();
    let failed =
        |cause: FoldersError| LaunchError { vm: vm.clone(), cause: cause.into(), last_words: String::new() };
    let files = folders.vm(&vm).map_err(failed)?;
    let mut launching = Launching {
        log: log_file(folders, &vm),
        vm: &vm,
        files,
        steps: Steps::of("launch"),
        owner_lock: None,
        life: None,
        journal: None,
        host: None,
        process: None,
    };
    match launching.go(&blueprint, folders, paused).await {
        Ok(born) => Ok(born),
        Err(cause) => {
            let spawned = launching.process.is_some();
            launching.undo().await;
            let mut last_words = if spawned { last_lines(&launching.log, 10) } else { String::new() };
            if quirks::is_locked(&last_words) {
                last_words = format!("{last_words}\n{}", users::explain(images(blueprint.layout.devices())));
            }
            Err(LaunchError { vm: vm.clone(), cause, last_words })
        }
    }
}

impl Launching<'_> {
    async fn go(&mut self, blueprint: &Blueprint, folders: &Folders, paused: bool) -> Result<Born, Cause> {
        let vm = self.vm;
        self.steps.enter("folder")?;
        folders.make()?;
        self.files.make()?;
        make_private(&folders.state_dir(vm))?;
        self.steps.enter("owner-lock")?;
        self.owner_lock =
            Some(OfdLock::try_acquire(&self.files.owner())?.ok_or(Cause::Owned { vm: vm.clone() })?);
        self.steps.enter("life-lock")?;
        self.life = Some(OfdLock::try_acquire(&self.files.life())?.ok_or(Cause::Alive { vm: vm.clone() })?);
        self.steps.enter("journal")?;
        let host = Host {
            vm: vm.clone(),
            run_dir: self.files.dir().to_owned(),
            state_dir: folders.state_dir(vm),
            leases: Leases::open(&folders.leases)?,
        };
        // Of an owner that died with the host.
        if let Err(error) = host.store().sweep(vm) {
            warn!(error = crate::request::chain(&error), "an overlay that was not finished may be left");
        }
        self.host = Some(Arc::new(host));
        let (journal, remains) = Journal::open(&self.files.journal(), vm)?;
        self.journal = Some(journal);
        if !remains.is_empty() {
            // Somebody launched and died since we looked.
            return Err(Cause::Remains { vm: vm.clone() });
        }
        let descriptors = self.prepare(blueprint)?;

        self.steps.enter("listen")?;
        let qmp = listen(&self.files.qmp())?;
        let rescue = listen(&self.files.rescue())?;
        let numbers: Numbers = descriptors.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).collect();
        let monitors = [qmp.as_raw_fd().to_string(), rescue.as_raw_fd().to_string()];
        let argv = blueprint.argv([&monitors[0], &monitors[1]], &numbers);

        self.steps.enter("save")?;
        let launch = record(blueprint, argv, paused);
        launch.save(&self.files.launch())?;

        self.steps.enter("spawn")?;
        let life = self.life.as_ref().expect("the life lock was taken above").as_fd();
        let mut inherit = vec![qmp.as_fd(), rescue.as_fd(), life];
        inherit.extend(descriptors.values().map(AsFd::as_fd));
        let args = launch.argv.iter().map(Into::into).collect();
        let spawn = Spawn {
            binary: &launch.binary,
            args,
            inherit,
            log: &self.log,
            memlock: memlock(blueprint),
            env: Vec::new(),
        };
        self.process = Some(spawn.start()?);
        drop((qmp, rescue, descriptors));
        self.steps.enter("identity")?;
        let identity = self.process().identity().clone();
        self.journal().append(&Entry::Started(identity))?;

        self.steps.enter("connect")?;
        let (qmp, events) = connect(&self.files.qmp(), self.process()).await?;
        self.steps.enter("agree")?;
        agree(&qmp, &launch).await?;
        info!(%vm, pid = self.process().pid(), accel = launch.accel_reason, "launched");
        let layout = launch.layout.clone();
        let stages = layout.devices().iter().map(|d| (d.id.clone(), Stage::Present)).collect();
        let taken = (self.journal.take(), self.host.take(), self.process.take(), self.owner_lock.take());
        let (Some(journal), Some(host), Some(process), Some(owner_lock)) = taken else {
            unreachable!("each was set by a step above");
        };
        let shop = Workshop { journal, host, qmp };
        Ok(Born {
            launch,
            log: self.log.clone(),
            process,
            events,
            shop,
            layout,
            stages,
            shortening: None,
            faults: BTreeMap::new(),
            owner_lock,
            life: self.life.take(),
        })
    }

    /// Journals every device, then meets its needs; gives the descriptors that QEMU is to inherit.
    fn prepare(&mut self, blueprint: &Blueprint) -> Result<BTreeMap<String, OwnedFd>, Cause> {
        pages::check(&blueprint.config.memory)?;
        let mut descriptors = BTreeMap::new();
        self.steps.enter("firmware")?;
        let firmware: DeviceId = "firmware".parse().expect("a good id");
        for (path, writes) in blueprint.machine.images() {
            let access = if writes { Access::Write } else { Access::Read };
            let leased = self.host().lease(&firmware, &path, access);
            leased.map_err(|source| Cause::Need { id: firmware.clone(), source })?;
        }
        for device in blueprint.layout.devices() {
            self.steps.enter("record")?;
            self.journal().append(&Entry::Device(Box::new(device.clone())))?;
            for need in &device.needs {
                self.steps.enter("need")?;
                let met = self.host().meet(&device.id, need);
                descriptors.extend(met.map_err(|source| Cause::Need { id: device.id.clone(), source })?);
            }
        }
        Ok(descriptors)
    }

    fn journal(&mut self) -> &mut Journal<Entry> {
        self.journal.as_mut().expect("the journal is opened before it is written")
    }

    fn host(&self) -> &Host {
        self.host.as_deref().expect("the host is there before anything is taken of it")
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("the process was spawned before it is asked")
    }

    /// Kills, reaps and undoes. Without the owner lock there is nothing of ours.
    async fn undo(&mut self) {
        if let Some(process) = self.process.take()
            && !end(&process).await
        {
            // It has everything still, and is a VM without an owner.
            warn!("{}", held_words(self.vm, std::iter::empty()));
            return;
        }
        // Without the locks the folder is another's: of an owner, or of a QEMU without one.
        let Some(_owner) = self.owner_lock.take() else {
            // An empty one is nobody's: whoever owns it has its lock in it.
            let _ = std::fs::remove_dir(self.files.dir());
            return;
        };
        let life = self.life.take();
        if life.is_none() && probe(&self.files.life()).unwrap_or(true) {
            return;
        }
        if let (Some(journal), Some(host)) = (self.journal.take(), self.host.take()) {
            let memory = crate::journal::read_only::<Entry>(&self.files.journal());
            let entries = memory.ok().flatten().map(|(_, entries)| entries).unwrap_or_default();
            let devices = crate::record::Memory::of(entries).devices;
            drop(journal);
            let _ = clear_up(&host, devices.into_iter().map(|(device, _)| device), self.files.dir());
        } else if matches!(crate::journal::has_entries(&self.files.journal()), Ok(false)) {
            remove_folder(self.files.dir());
        }
    }
}

/// The images that devices need.
pub fn images(devices: &[Placed]) -> impl Iterator<Item = &str> {
    let needs = devices.iter().flat_map(|device| &device.needs);
    needs.filter_map(|need| if let HostNeed::Image { path, .. } = need { Some(path.as_str()) } else { None })
}

/// How long QEMU has to flush and end on SIGTERM before SIGKILL.
pub const GRACE: Duration = Duration::from_millis(1200);
/// How long after the first signal it is said to be held by the kernel.
pub const HELD: Duration = Duration::from_millis(1800);

/// Ends QEMU: SIGTERM so that it flushes, then SIGKILL. `false` if it is still there: a task of it is in uninterruptible I/O, and ends with that.
pub async fn end(process: &Process) -> bool {
    let _ = process.signal(Signal::SIGTERM);
    if tokio::time::timeout(GRACE, process.exited()).await.is_ok() {
        return true;
    }
    match process.kill(HELD.saturating_sub(GRACE)).await {
        Ok(exit) => exit.is_some(),
        Err(error) => {
            warn!(%error, "QEMU could not be killed");
            false
        }
    }
}

/// What is said of a QEMU that was killed and does not go, having these images open.
pub fn held_words<'a>(vm: &VmName, images: impl Iterator<Item = &'a str>) -> String {
    let images: Vec<&str> = images.collect();
    let storage = if images.is_empty() { String::new() } else { format!(" in I/O on {}", images.join(", ")) };
    format!(
        "VM {vm}: killed, still held by the kernel{storage}: it ends when its storage answers, and keeps its leases until then; \
         `qvirt list` shows it"
    )
}

/// Something of the host could not be given back. The runtime folder and its journal stay, so that it can be tried again.
#[derive(Debug, Error)]
#[error("device {id} of VM {vm} still has something of the host: `qvirt recover {vm}` tries again")]
pub struct Unfinished {
    vm: VmName,
    id: DeviceId,
    source: NeedError,
}

/// Gives back all that a VM had of the host, and removes its runtime folder. The caller holds the owner lock, and QEMU is dead.
pub fn clear_up(
    host: &Host,
    devices: impl Iterator<Item = Placed>,
    run_dir: &Path,
) -> Result<(), Unfinished> {
    let mut devices: Vec<Placed> = devices.collect();
    devices.reverse();
    let mut outcome = Ok(());
    let mut in_use = Vec::new();
    for device in &devices {
        if let Err(source) = host.give_all_back(device) {
            if matches!(source, NeedError::ProxyStays { .. }) {
                in_use.push(device.id.as_str());
            }
            warn!(device = %device.id, error = crate::request::chain(&source), "could not give everything back to the host");
            outcome = outcome.and(Err(Unfinished { vm: host.vm.clone(), id: device.id.clone(), source }));
        }
    }
    if let Err(error) = host.store().sweep(&host.vm) {
        warn!(error = crate::request::chain(&error), "an overlay that was not finished may be left");
    }
    if let Err(error) = host.leases.release_all_but(&host.vm, run_dir, &in_use) {
        warn!(error = crate::request::chain(&error), "could not release all leases");
    }
    outcome.inspect(|()| remove_folder(run_dir))
}

/// Moves the folder aside first: whoever launches the VM meanwhile makes it anew, and keeps it.
pub(crate) fn remove_folder(run_dir: &Path) {
    let name = run_dir.file_name().unwrap_or_default().to_string_lossy();
    let aside = run_dir.with_file_name(format!(".gone-{name}-{}", std::process::id()));
    let removed = match std::fs::rename(run_dir, &aside) {
        Ok(()) => std::fs::remove_dir_all(&aside),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            warn!(folder = ?run_dir, %error, "the runtime folder could not be removed");
        }
        _ => {}
    }
}

/// What a VFIO device pins: all of the guest's memory, and some room for the device's own. One that is plugged in later needs it too, and the limit of a
/// running QEMU cannot be raised.
fn memlock(blueprint: &Blueprint) -> Memlock {
    let bytes = blueprint.config.memory.size.as_bytes().saturating_add(1 << 30);
    match blueprint.layout.devices().iter().any(|device| device.passes().is_some()) {
        true => Memlock::Needed(bytes),
        false => Memlock::Wanted(bytes),
    }
}

fn listen(path: &Path) -> Result<UnixListener, Cause> {
    let failed = |source| Cause::Listen { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(path).map_err(failed)
}

/// Connects to QEMU's monitor and negotiates; that QEMU dies meanwhile is an error of its own.
pub async fn connect(path: &Path, process: &Process) -> Result<(Qmp, Events), Cause> {
    let connecting = async {
        let stream = tokio::net::UnixStream::connect(path).await;
        let stream = stream.map_err(|source| Cause::Socket { path: path.to_owned(), source })?;
        let options = Options { greeting_deadline: GREETING, ..Options::default() };
        Ok(Qmp::connect(stream, options).await?)
    };
    tokio::select! {
        connected = connecting => match connected {
            // A QEMU that dies closes its monitor a moment before it is gone.
            Err(cause) => match tokio::time::timeout(Duration::from_secs(1), process.exited()).await {
                Ok(exit) => Err(Cause::Died { exit: exit.to_string() }),
                Err(_) => Err(cause),
            },
            connected => connected,
        },
        exit = process.exited() => Err(Cause::Died { exit: exit.to_string() }),
    }
}

/// Checks that it is the VM's own QEMU, and has every device it was started with.
async fn agree(qmp: &Qmp, launch: &Launch) -> Result<(), Cause> {
    same_uuid(qmp, &launch.machine.uuid).await?;
    let peripherals = crate::work::peripherals(qmp).await?;
    let frontends = launch.layout.devices().iter().filter(|d| d.spec.frontend.is_some());
    match frontends.map(|d| &d.id).find(|id| !peripherals.iter().any(|p| p == id.as_str())) {
        Some(id) => Err(Cause::Missing { id: id.clone() }),
        None => Ok(()),
    }
}

/// Checks the UUID of the QEMU behind a connection.
pub async fn same_uuid(qmp: &Qmp, expected: &str) -> Result<(), Cause> {
    let reply = qmp.call("query-uuid", Value::Null).await;
    let reply = reply.map_err(|source| StepError::Qmp { command: "query-uuid", source })?;
    match reply["UUID"].as_str() {
        Some(found) if found.eq_ignore_ascii_case(expected) => Ok(()),
        found => {
            Err(Cause::Stranger { found: found.unwrap_or("none").to_owned(), expected: expected.to_owned() })
        }
    }
}

fn record(blueprint: &Blueprint, argv: Vec<String>, paused: bool) -> Launch {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Launch {
        format: FORMAT,
        vm: blueprint.config.name.clone(),
        since_unix_secs: now.as_secs(),
        binary: blueprint.binary.clone(),
        qemu: blueprint.qemu.clone(),
        machine: blueprint.machine.clone(),
        layout: blueprint.layout.clone(),
        argv,
        accel_reason: blueprint.accel_reason.clone(),
        paused,
        notify: blueprint.config.notify.clone(),
        warnings: blueprint.warnings.clone(),
    }
}
