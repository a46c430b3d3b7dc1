//! Huge pages: whether this host has enough of them left for a guest.
//!
//! Looked at before QEMU starts, since QEMU says only "Cannot allocate memory". QEMU still has the last word: pages may go meanwhile.

use std::path::{Path, PathBuf};

use devices::machine::Memory;
use devices::units::Size;

/// Why a guest cannot have its huge pages.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The processor or the kernel does not do this size.
    #[error("this host has no huge pages of {page}: `hugepages` may be {}", list(.known))]
    NoSuchSize {
        /// What the config says.
        page: Size,
        /// What would go.
        known: Vec<Size>,
    },
    /// Not enough are left.
    #[error(
        "the memory takes {wanted} huge pages of {page}, and this host has {available} left: end another VM, or raise \
         the number in {}", pool.join("nr_hugepages").display()
    )]
    TooFew {
        /// Pages that the guest takes.
        wanted: u64,
        /// The size of one.
        page: Size,
        /// Pages that nobody holds or was promised.
        available: u64,
        /// The kernel's folder of this size.
        pool: PathBuf,
    },
}

/// Checks that this host has the huge pages that `memory` takes, if it takes any.
pub fn check(memory: &Memory) -> Result<(), PagesError> {
    check_below(Path::new("/sys/kernel/mm/hugepages"), memory)
}

fn check_below(pools: &Path, memory: &Memory) -> Result<(), PagesError> {
    let Some(page) = memory.hugepages else { return Ok(()) };
    let pool = pools.join(format!("hugepages-{}kB", page.as_bytes() >> 10));
    if !pool.is_dir() {
        return Err(PagesError::NoSuchSize { page, known: sizes(pools) });
    }
    let number = |name: &str| std::fs::read_to_string(pool.join(name)).ok()?.trim().parse::<u64>().ok();
    // Free ones may be promised to somebody who has mapped them and not touched them; the kernel may make some more on demand.
    let numbers =
        ["free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"].map(number);
    // What cannot be read says nothing; QEMU will.
    let [Some(free), Some(promised), Some(possible), Some(surplus)] = numbers else { return Ok(()) };
    let available = free.saturating_sub(promised) + possible.saturating_sub(surplus);
    let wanted = memory.size.as_bytes() / page.as_bytes();
    match wanted <= available {
        true => Ok(()),
        false => Err(PagesError::TooFew { wanted, page, available, pool }),
    }
}

/// The sizes that the kernel has pools of, smallest first.
fn sizes(pools: &Path) -> Vec<Size> {
    let names = std::fs::read_dir(pools).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let kib = names.filter_map(|name| {
        name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()
    });
    let mut kib: Vec<u64> = kib.collect();
    kib.sort_unstable();
    kib.into_iter().map(|kib| Size::bytes(kib << 10)).collect()
}

fn list(sizes: &[Size]) -> String {
    match sizes {
        [] => "left out only".to_owned(),
        sizes => sizes.iter().map(|size| format!("\"{size}\"")).collect::<Vec<_>>().join(" or "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(mib: u64, page_mib: u64) -> Memory {
        let size = |mib: u64| Size::bytes(mib << 20);
        Memory { size: size(mib), shared: false, hugepages: Some(size(page_mib)), prealloc: false }
    }

    fn pool(numbers: &[(&str, u64)]) -> tempfile::TempDir {
        let pools = tempfile::tempdir().expect("a temporary folder");
        let folder = pools.path().join("hugepages-2048kB");
        std::fs::create_dir(&folder).expect("a folder");
        let others = ["free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"];
        for (name, number) in
            others.iter().map(|name| (name, &0)).chain(numbers.iter().map(|(name, number)| (name, number)))
        {
            std::fs::write(folder.join(name), format!("{number}\n")).expect("a file");
        }
        pools
    }

    #[test]
    fn promised_pages_do_not_count_and_possible_ones_do() {
        let free = pool(&[("free_hugepages", 8), ("resv_hugepages", 3)]);
        assert!(check_below(free.path(), &memory(10, 2)).is_ok());
        let error = check_below(free.path(), &memory(12, 2)).expect_err("one too many").to_string();
        assert!(error.contains("takes 6 huge pages of 2MiB, and this host has 5 left"), "{error}");
        assert!(error.contains("hugepages-2048kB/nr_hugepages"), "{error}");
        let more = pool(&[("free_hugepages", 0), ("nr_overcommit_hugepages", 9), ("surplus_hugepages", 2)]);
        assert!(check_below(more.path(), &memory(14, 2)).is_ok());
        assert!(check_below(more.path(), &memory(16, 2)).is_err());
    }

    #[test]
    fn a_size_that_the_host_has_not_is_refused_with_those_it_has() {
        let error = check_below(pool(&[]).path(), &memory(1024, 1024)).expect_err("no such size").to_string();
        assert_eq!(error, "this host has no huge pages of 1GiB: `hugepages` may be \"2MiB\"");
    }
}
