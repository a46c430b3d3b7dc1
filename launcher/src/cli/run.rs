//! `run` and `start`: launching or adopting a VM, and owning it.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::host::IoProxy;
use devices::{DeviceConfig, Placed};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::args::{Run, Start};
use super::{Exit, Problem, target};
use crate::adopt::{Life, adopt, life, recover};
use crate::blueprint::Blueprint;
use crate::console::{Console, Until, User};
use crate::control::{self, Shared};
use crate::folders::{Folders, VmFiles, VmName};
use crate::host::io_proxy;
use crate::launch::{clear_up, held_words, launch};
use crate::owner::{Born, Ending, Handle, Owner, Signal};

/// What a detached owner writes when the guest runs.
const READY: &str = "ready\n";

/// How long clients may take to read what was on its way to them when the owner ends.
const PARTING: Duration = Duration::from_millis(500);

/// `qvirt run`
pub async fn run(args: Run) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, &args.target)?;
    if args.detached {
        // The terminal's Ctrl-C and its end are not for us.
        nix::unistd::setsid().map_err(std::io::Error::from)?;
    }
    // Before anything is started, so that no signal finds us with half a VM.
    let signals = signals()?;
    let (born, unfinished) = bring_up(&folders, &vm, &args).await?;
    let (mut owner, handle) = Owner::new(born).await;
    let open = open(&folders, &vm, &args, &mut owner, &handle, unfinished).await;
    let (serving, console) = match open {
        Ok(open) => open,
        // An adopted VM runs on; a launch that cannot be finished is undone.
        Err(problem) => {
            if unfinished {
                let _ = end(&folders, &vm, owner.abort().await).await;
            }
            return Err(problem);
        }
    };
    let ending = owner.run(signals).await;
    // Clients get their last words; one that does not take them is not waited for.
    for task in serving {
        let _ = tokio::time::timeout(PARTING, task).await;
    }
    if let Some((leave, thread)) = console {
        drop(leave);
        let _ = thread.join();
    }
    if matches!(ending, Ending::Stopped { .. }) {
        proxies_end(&vm, &devices_of(&folders.vm(&vm)?)).await?;
    }
    end(&folders, &vm, ending).await
}

/// What an owner is heard and seen by.
type Open = (Vec<tokio::task::JoinHandle<()>>, Option<(OwnedFd, JoinHandle<()>)>);

/// Opens the control sockets and the console, and lets the guest go.
async fn open(
    folders: &Folders,
    vm: &VmName,
    args: &Run,
    owner: &mut Owner,
    handle: &Handle,
    unfinished: bool,
) -> Result<Open, Problem> {
    let serving = serve(folders, vm, handle)?;
    let console = if args.console { Some(open_console(folders, vm, handle)?) } else { None };
    if unfinished {
        owner.go().await?;
    }
    let console = console.map(|console| attach_console(console, vm)).transpose()?;
    if args.detached {
        detach_from_starter()?;
    } else if console.is_none() {
        let status = handle.status.borrow().clone();
        println!("{vm} is {}: pid {}, {}", status.run, status.pid, status.accel);
    }
    Ok((serving, console))
}

/// Adopts the VM if it runs, clears up if it is dead, and launches it.
async fn bring_up(folders: &Folders, vm: &VmName, args: &Run) -> Result<(Born, bool), Problem> {
    match life(&folders.vm(vm)?)? {
        Life::Orphan => {
            if args.paused {
                let message = format!(
                    "VM {vm} is running without an owner, and --paused is for a start: leave it out to adopt the VM"
                );
                return Err(Problem::new(Exit::Refused, message));
            }
            return Ok(adopt(folders, vm).await?);
        }
        Life::Owned | Life::Between => {
            let message = format!("VM {vm} is running already, with an owner: `qvirt status {vm}` shows it");
            return Err(Problem::new(Exit::Refused, message));
        }
        Life::Remains => {
            let devices = recover(folders, vm)?;
            warn!(%vm, ?devices, "cleared up what a dead VM left");
        }
        Life::None => {}
    }
    let config = target::config(folders, &args.target)?;
    if args.console && !config.devices.iter().any(|d| matches!(d, DeviceConfig::Serial(_))) {
        return Err(no_console(vm));
    }
    let blueprint = Blueprint::draw(config, folders).await?;
    // Whoever starts a detached one reads it up to the word that it is ready.
    blueprint.tops().for_each(|words| println!("{words}"));
    Ok((launch(blueprint, folders, args.paused).await?, true))
}

/// Makes the control sockets and serves them.
fn serve(
    folders: &Folders,
    vm: &VmName,
    handle: &Handle,
) -> Result<Vec<tokio::task::JoinHandle<()>>, Problem> {
    let files = folders.vm(vm)?;
    let shared = Shared {
        qmp: handle.qmp.clone(),
        status: handle.status.clone(),
        requests: handle.requests.clone(),
        events: handle.events.clone(),
    };
    let full = control::bind(&files.control(), 0o600)?;
    let read_only = control::bind(&files.control_ro(), 0o660)?;
    Ok(vec![
        tokio::spawn(control::serve(full, shared.clone(), false)),
        tokio::spawn(control::serve(read_only, shared, true)),
    ])
}

/// TERM and INT end the VM, HUP leaves it; a closed terminal is a HUP too.
fn signals() -> Result<mpsc::Receiver<Signal>, Problem> {
    let (sender, receiver) = mpsc::channel(8);
    let kinds = [
        (SignalKind::terminate(), Signal::End),
        (SignalKind::interrupt(), Signal::End),
        (SignalKind::hangup(), Signal::Leave),
    ];
    for (kind, meaning) in kinds {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(
            async move { while stream.recv().await.is_some() && sender.send(meaning).await.is_ok() {} },
        );
    }
    Ok(receiver)
}

fn open_console(folders: &Folders, vm: &VmName, handle: &Handle) -> Result<Console, Problem> {
    let status = handle.status.borrow().clone();
    let Some((id, pty)) = status.devices.iter().find_map(|d| Some((d.id.clone(), d.pty.clone()?))) else {
        return Err(no_console(vm));
    };
    Ok(Console::open(pty.as_ref(), &folders.vm(vm)?.console_lock(&id), false)?)
}

fn no_console(vm: &VmName) -> Problem {
    let message =
        format!("VM {vm} has no serial console: write [[serial]] into its config, or leave --console out");
    Problem::new(Exit::Usage, message)
}

/// Copies between the terminal and the console in a thread of its own; dropping the descriptor ends it.
fn attach_console(console: Console, vm: &VmName) -> Result<(OwnedFd, JoinHandle<()>), Problem> {
    let (leave, leaver) = std::io::pipe()?;
    let user = User::of_process()?;
    eprintln!("Connected to the console of {vm}; ^] leaves it, the VM runs on.");
    let thread = std::thread::spawn(move || {
        let left = console.attach(&user, &Until::Readable(leave.into()));
        drop(console);
        match left {
            Ok(leave) => eprintln!("\n{leave}"),
            Err(error) => eprintln!("\nqvirt: {}", crate::request::chain(&error)),
        }
    });
    Ok((leaver.into(), thread))
}

/// Tells whoever started us that the guest runs, and lets go of its pipe.
fn detach_from_starter() -> Result<(), Problem> {
    let mut stdout = std::io::stdout();
    stdout.write_all(READY.as_bytes())?;
    stdout.flush()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null).map_err(std::io::Error::from)?;
    Ok(())
}

/// The devices that a VM has of the host, by its journal.
fn devices_of(files: &VmFiles) -> Vec<Placed> {
    let entries = crate::journal::read_only::<crate::record::Entry>(&files.journal()).ok().flatten();
    let devices = entries.map(|(_, entries)| crate::record::Memory::of(entries).devices).unwrap_or_default();
    devices.into_iter().map(|(device, _)| device).collect()
}

/// Waits for the io-proxies of a VM that is dead: the kernel may still have I/O of theirs, and their images stay leased until then. A signal ends
/// the wait; then they stay so until `qvirt recover`.
async fn proxies_end(vm: &VmName, devices: &[Placed]) -> Result<(), Problem> {
    let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut is_told = false;
    loop {
        let proxies = devices.iter().filter_map(Placed::io_proxy).cloned().collect();
        let until = Instant::now() + io_proxy::KILLED;
        let held =
            tokio::task::spawn_blocking(move || io_proxy::kill(proxies, until)).await.unwrap_or_default();
        if held.is_empty() {
            return Ok(());
        }
        if !std::mem::replace(&mut is_told, true) {
            warn!("{}", held_words(vm, held.iter().flat_map(IoProxy::images)));
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            _ = signals.0.recv() => return Ok(()),
            _ = signals.1.recv() => return Ok(()),
        }
    }
}

async fn end(folders: &Folders, vm: &VmName, ending: Ending) -> Result<Exit, Problem> {
    let files = folders.vm(vm)?;
    let (reason, in_order, last_words, shop, launch, _locks) = match ending {
        Ending::Left { locks } => {
            for socket in [files.control(), files.control_ro()] {
                let _ = std::fs::remove_file(socket);
            }
            drop(locks);
            println!("{vm} runs on without an owner: `qvirt run {vm}` adopts it");
            return Ok(Exit::Done);
        }
        Ending::Stopped { reason, in_order, last_words, shop, launch, locks } => {
            (reason, in_order, last_words, shop, launch, locks)
        }
    };
    info!(%vm, reason, uuid = launch.machine.uuid, "stopped");
    let devices = devices_of(&files);
    match shop {
        Some(shop) => {
            let workshop = *shop;
            drop(workshop.journal);
            let cleared = clear_up(&workshop.host, devices.into_iter(), files.dir());
            cleared.map_err(|error| Problem::of(Exit::Failed, &error))?;
        }
        None => warn!(%vm, "a job did not end with QEMU: `qvirt recover {vm}` clears up"),
    }
    if in_order {
        println!("{vm} has stopped: {reason}");
        return Ok(Exit::Done);
    }
    let words =
        if last_words.is_empty() { String::new() } else { format!("\nQEMU's last words:\n{last_words}") };
    Err(Problem::new(Exit::Failed, format!("VM {vm} ended: {reason}{words}")))
}

/// `qvirt start`: the same program as `run`, in a session of its own, heard until the guest runs.
pub async fn start(args: Start) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, &args.target)?;
    // A socket path that is too long, before anything is made.
    folders.vm(&vm)?;
    folders.make()?;
    crate::folders::make_private(&folders.state_dir(&vm))?;
    let log = folders.state_dir(&vm).join("owner.log");
    let (reading, writing) = std::io::pipe()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["run", "--detached"]).args(args.paused.then_some("--paused")).arg("--").arg(&args.target);
    // Appended to: another owner of this VM may be writing there.
    let owner_log = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
    let before = keep_short(&owner_log)?;
    command.stdin(Stdio::null()).stdout(writing).stderr(owner_log);
    let mut child = command.spawn()?;
    drop(command);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut { reading }, &mut said)?;
    if let Some(words) = said.strip_suffix(READY) {
        print!("{words}");
        println!("{vm} is {}", if args.paused { "starting, paused" } else { "running" });
        return Ok(Exit::Done);
    }
    let status = child.wait()?;
    let words = std::fs::read(&log).unwrap_or_default();
    let words = String::from_utf8_lossy(words.get(before..).unwrap_or_default()).into_owned();
    // Warnings come first, as they are; the last thing an owner says is why it failed.
    let last = words.rfind("\nqvirt: ").map_or(0, |end_of_line| end_of_line + 1);
    eprint!("{}", &words[..last]);
    let words = words[last..].trim_end();
    let words = words.strip_prefix("qvirt: ").unwrap_or(words).to_owned();
    let exit = status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1);
    Err(Problem { exit, message: words })
}

/// Empties an owner's log that has grown past 1 MiB; gives the length that it has.
fn keep_short(log: &std::fs::File) -> std::io::Result<usize> {
    if log.metadata()?.len() > 1 << 20 {
        log.set_len(0)?;
    }
    Ok(usize::try_from(log.metadata()?.len()).unwrap_or(usize::MAX))
}
