//! From which image a disk starts, and which ones must not be opened for writing. Blocks; to be called from a worker.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use devices::host::{Format, Layer};
use thiserror::Error;

use super::book::{Chain, Standing};
use super::store::{Store, StoreError};
use crate::image::{self, ImageError};

/// An image that must not be written.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum TopError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "image {path}: it is the state of snapshot {snapshot} of VM {vm}, and overlay {overlay} stands on it: writing it would destroy both; \
         name {base}, from whose current top a VM starts, or open it with read_only = true"
    )]
    Below { path: String, overlay: String, snapshot: String, vm: String, base: String },
    #[error(
        "image {path}: it is not the file that overlay {top} was made on, which has been replaced: put the former one back, or, if the \
         snapshots are of no use any more, `qvirt chain check` says what to do"
    )]
    Replaced { path: String, top: String },
    #[error(
        "image {base}: its top is to be {top}, and the backing files of that one do not lead to it: `qvirt chain check` says what to do"
    )]
    Astray { base: String, top: String },
}

/// The layers that a disk starts from which writes the image that its config names: those of the chain's top, if it has one.
///
/// # Errors
/// An image cannot be used, or must not be written.
pub fn chain(store: &Store, path: &str, format: Option<Format>) -> Result<Vec<Layer>, TopError> {
    let book = store.read()?;
    let found = match fs::canonicalize(path).and_then(|path| Ok((fs::metadata(&path)?, path))) {
        Ok((found, canonical)) if !book.chains.is_empty() => Some((found, canonical)),
        // Whatever is wrong with it is said by whoever opens it.
        _ => None,
    };
    let Some((found, canonical)) = found else { return Ok(image::chain(path, format)?) };
    let canonical = canonical.to_string_lossy().into_owned();
    match book.standing(&canonical, (found.dev(), found.ino())) {
        Standing::Unknown | Standing::Top(_) | Standing::Abandoned(_) => Ok(image::chain(path, format)?),
        // The number of a base that was removed may be another file's by now.
        Standing::Base(chain) if !is_base(chain, &found) => Ok(image::chain(path, format)?),
        Standing::Base(chain) => from_top(chain),
        Standing::Replaced(chain) => {
            Err(TopError::Replaced { path: path.to_owned(), top: chain.top.clone() })
        }
        Standing::Below(above) => {
            let of = |chain: &&Chain| chain.overlays.iter().any(|overlay| overlay.path == above.path);
            let base = book.chains.iter().find(of).map(|chain| chain.base.clone()).unwrap_or_default();
            Err(TopError::Below {
                path: path.to_owned(),
                overlay: above.path.clone(),
                snapshot: above.snapshot.to_string(),
                vm: above.vm.to_string(),
                base,
            })
        }
    }
}

/// Whether a file is a chain's base, by whatever name.
fn is_base(chain: &Chain, found: &fs::Metadata) -> bool {
    fs::metadata(&chain.base).is_ok_and(|base| (base.dev(), base.ino()) == (found.dev(), found.ino()))
}

fn from_top(chain: &Chain) -> Result<Vec<Layer>, TopError> {
    let layers = image::chain(&chain.top, Some(Format::Qcow2))?;
    let leads =
        |layer: &Layer| fs::canonicalize(&layer.path).is_ok_and(|path| path == Path::new(&chain.base));
    match layers.iter().any(leads) {
        true => Ok(layers),
        false => Err(TopError::Astray { base: chain.base.clone(), top: chain.top.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::book::{Book, Overlay};

    #[test]
    fn a_number_that_another_file_has_now_means_nothing() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = |name: &str| temp.path().join(name).display().to_string();
        fs::write(path("new.img"), "x").expect("written");
        let found = fs::metadata(path("new.img")).expect("there");
        let overlay = Overlay {
            path: path("gone.one.qcow2"),
            backing: path("gone.img"),
            vm: "web".parse().expect("a name"),
            snapshot: "one".parse().expect("a name"),
            unwanted: false,
            pulling: false,
        };
        let chain = Chain {
            base: path("gone.img"),
            format: Format::Raw,
            inode: found.ino(),
            device: found.dev(),
            top: overlay.path.clone(),
            overlays: vec![overlay],
        };
        let store = Store::new(temp.path());
        store
            .change::<_, StoreError>(|book| {
                *book = Book { chains: vec![chain], format: book.format, ..Book::default() };
                Ok(())
            })
            .expect("written");
        let layers = super::chain(&store, &path("new.img"), None).expect("an image like any other");
        assert_eq!(layers.iter().map(|layer| layer.path.clone()).collect::<Vec<_>>(), [path("new.img")]);
        // By another name of the base it is the base.
        fs::hard_link(path("new.img"), path("gone.img")).expect("a link");
        assert!(
            matches!(super::chain(&store, &path("new.img"), None), Err(TopError::Image(_))),
            "its top is gone"
        );
    }
}
