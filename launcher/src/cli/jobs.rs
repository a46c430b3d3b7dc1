//! `qvirt jobs` and `qvirt job`: QEMU's block jobs, as it has them.

use serde_json::{Value, json};

use super::args::JobChange;
use super::client::connect;
use super::{Exit, Problem, print};
use crate::folders::{Folders, VmName};

/// `qvirt jobs`
pub async fn jobs(vm: &VmName, as_json: bool) -> Result<Exit, Problem> {
    let jobs = connect(&Folders::find()?, vm).await?.call("query-jobs", Value::Null).await?;
    if as_json {
        print::json(&jobs)?;
        return Ok(Exit::Done);
    }
    let cells = |job: &Value| {
        let text = |key: &str| job[key].as_str().unwrap_or("-").to_owned();
        let (done, all) = (job["current-progress"].as_u64(), job["total-progress"].as_u64());
        let percent = done.zip(all.filter(|all| *all > 0)).map(|(done, all)| done.saturating_mul(100) / all);
        let percent = percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent}%"));
        vec![text("id"), text("type"), text("status"), percent, text("error")]
    };
    let rows: Vec<Vec<String>> = jobs.as_array().into_iter().flatten().map(cells).collect();
    print::table(&["JOB", "TYPE", "STATUS", "DONE", "ERROR"], &rows)?;
    Ok(Exit::Done)
}

/// `qvirt job`
pub async fn change(what: JobChange, vm: &VmName, job: &str) -> Result<Exit, Problem> {
    let client = connect(&Folders::find()?, vm).await?;
    let jobs = client.call("query-jobs", Value::Null).await?;
    let ids: Vec<&str> = jobs.as_array().into_iter().flatten().filter_map(|job| job["id"].as_str()).collect();
    if !ids.contains(&job) {
        let ids = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
        return Err(Problem::new(Exit::Unknown, format!("VM {vm} has no job {job}: it has {ids}")));
    }
    let id = json!({"id": job});
    let done = match what {
        JobChange::Cancel => client.call("job-cancel", id).await?,
        JobChange::Pause => client.call("job-pause", id).await?,
        JobChange::Resume => client.call("job-resume", id).await?,
    };
    drop(done);
    Ok(Exit::Done)
}
