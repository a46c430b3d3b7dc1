//! `qvirt block`: a disk's layers, and its size.

use std::path::Path;

use devices::units::Size;
use serde_json::{Value, json};

use super::args::Block;
use super::client::connect;
use super::progress::follow;
use super::snapshot::{is_live, say_deleted};
use super::{Exit, Problem, target};
use crate::folders::{Folders, VmName};
use crate::request::{BlockCommit, BlockPull, BlockResize};
use crate::snapshot::stopped::StoppedVm;

/// `qvirt block`
pub async fn block(words: Block) -> Result<Exit, Problem> {
    match words {
        Block::Commit { vm, disk, top, base, delete_snapshots, speed, json } => {
            let (top, base) = (image(top.as_deref())?, image(base.as_deref())?);
            commit(&vm, BlockCommit { id: disk, top, base, delete_snapshots, speed }, json).await
        }
        Block::Pull { vm, disk, base, sparse, speed, json } => {
            pull(&vm, BlockPull { id: disk, base: image(base.as_deref())?, sparse, speed }, json).await
        }
        Block::Resize { vm, disk, size } => resize(&vm, &disk, size).await,
    }
}

/// An image as the chains name it.
fn image(path: Option<&Path>) -> Result<Option<String>, Problem> {
    let Some(path) = path else { return Ok(None) };
    let failed = |error| {
        Problem::new(
            Exit::Unknown,
            format!("image {}: {error}: `qvirt blocks` shows the chains", path.display()),
        )
    };
    let path = path.canonicalize().map_err(failed)?;
    Ok(Some(path.to_string_lossy().into_owned()))
}

async fn commit(target: &str, wish: BlockCommit, as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, target)?;
    let names: Vec<String> = if is_live(&folders, &vm)? {
        let done = follow(&folders, &vm, "qvirt-block-commit", &wish, as_json).await?;
        let names = done["names"].as_array().into_iter().flatten();
        names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
    } else {
        let held = StoppedVm::hold(&folders, target::config(&folders, target)?).await?;
        held.commit(&wish)?.iter().map(ToString::to_string).collect()
    };
    if as_json {
        println!("{}", json!({"deleted": names}));
        return Ok(Exit::Done);
    }
    say_deleted(&vm, &names);
    let below = wish.base.as_deref().unwrap_or("the image that its config names");
    println!("{} of {vm}: its layers went into {below}", wish.id);
    Ok(Exit::Done)
}

async fn pull(target: &str, wish: BlockPull, as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, target)?;
    let base = if is_live(&folders, &vm)? {
        let done = follow(&folders, &vm, "qvirt-block-pull", &wish, as_json).await?;
        done["base"].as_str().map(str::to_owned)
    } else {
        let held = StoppedVm::hold(&folders, target::config(&folders, target)?).await?;
        held.pull(&wish)?
    };
    if as_json {
        println!("{}", json!({"id": wish.id, "base": base}));
        return Ok(Exit::Done);
    }
    match base {
        Some(base) => println!("{} of {vm}: its uppermost layer stands on {base}", wish.id),
        None => println!("{} of {vm}: its uppermost layer stands on nothing", wish.id),
    }
    Ok(Exit::Done)
}

async fn resize(vm: &VmName, disk: &str, size: Size) -> Result<Exit, Problem> {
    let wish = BlockResize { id: disk.to_owned(), size };
    let _: Value = connect(&Folders::find()?, vm).await?.ask("qvirt-block-resize", &wish).await?;
    println!("{disk} of {vm} has {size}");
    Ok(Exit::Done)
}
