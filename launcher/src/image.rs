//! Disk images before QEMU opens them: what kind of file, and a qcow2's chain of backing files, spelled to the bottom.
//!
//! Reads headers only, takes no lock and guesses no format: a layer's format comes from the config or from the overlay's header.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devices::host::{Format, Layer};
use thiserror::Error;

/// An image that cannot be used as it is.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("image {} cannot be opened: {source}; check its path, and the rights on it of whoever runs qvirt", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its storage is out of order.
    #[error("image {}: reading it failed: {source}; repair its storage, then try again", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("image {}: it is neither a file nor a block device: name an image, or a device below /dev", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Said to be qcow2, and is not.
    #[error("image {}: it is no qcow2 image ({reason}): write the format it has, or make it with `qemu-img create -f qcow2`", path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
        /// What its header says.
        reason: String,
    },
    /// Is qcow2, and the config did not say so: as raw, the guest would see the container and could point its header anywhere.
    #[error("image {}: it begins like a qcow2 image, and its format is not given: write format = \"qcow2\" (or \"raw\" if the guest is to see the container itself)", path.display())]
    Unsaid {
        /// The image.
        path: PathBuf,
    },
    /// The overlay does not say what its backing file is.
    #[error("image {}: its header names backing file {backing:?} without a format, and formats are never guessed: \
             record it with `qemu-img rebase -u -b {backing} -F FORMAT {}`", path.display(), path.display())]
    BackingFormat {
        /// The overlay.
        path: PathBuf,
        /// The backing file.
        backing: String,
    },
    /// A backing file that is no local path.
    #[error("image {}: backing file {backing:?} is refused: {reason}", path.display())]
    Backing {
        /// The overlay.
        path: PathBuf,
        /// The backing file.
        backing: String,
        /// Why.
        reason: &'static str,
    },
    /// A layer further down, that the config does not name.
    #[error("image {}: its chain of backing files cannot be used: {source}", top.display())]
    Below {
        /// The image that was named.
        top: PathBuf,
        /// What is wrong with the other.
        source: Box<ImageError>,
    },
}

/// Longest chain: QEMU itself becomes slow long before.
const MAX_DEPTH: usize = 200;

/// The layers of an image, top first. `format` as the config gives it; without one the image is raw, and must not look like qcow2.
pub fn chain(path: &str, format: Option<Format>) -> Result<Vec<Layer>, ImageError> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((layer_path, format)) = next.take() {
        let (layer, backing) =
            layer(&layer_path, format, &layers).map_err(|error| match layers.is_empty() {
                true => error,
                false => ImageError::Below { top: path.into(), source: Box::new(error) },
            })?;
        layers.push(layer);
        next = backing.map(|(path, format)| (path, Some(format)));
    }
    Ok(layers)
}

/// One layer, and the backing file that its header names. `above` are the layers that lead to it.
fn layer(
    path: &str,
    format: Option<Format>,
    above: &[Layer],
) -> Result<(Layer, Option<(String, Format)>), ImageError> {
    let (file, block_device) = open(Path::new(path))?;
    read_storage(Path::new(path)).map_err(|source| ImageError::Read { path: path.into(), source })?;
    let magic =
        read_at(&file, 0, 4).map_err(|source| ImageError::Read { path: path.into(), source })? == MAGIC;
    if format.is_none() && magic {
        return Err(ImageError::Unsaid { path: path.into() });
    }
    let format = format.unwrap_or(Format::Raw);
    let backing = if format == Format::Qcow2 { backing(&file, Path::new(path))? } else { None };
    if let Some((backing, _)) = &backing
        && (above.len() >= MAX_DEPTH || *backing == path || above.iter().any(|layer| layer.path == *backing))
    {
        let reason = "the chain of backing files has no end: it comes back to itself, or is longer than 200; `qemu-img rebase` gives it another";
        return Err(ImageError::Backing { path: path.into(), backing: backing.clone(), reason });
    }
    Ok((Layer { path: path.to_owned(), format, block_device }, backing))
}

fn open(path: &Path) -> Result<(File, bool), ImageError> {
    let failed = |source| ImageError::Open { path: path.to_owned(), source };
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind { path: path.to_owned() });
    }
    Ok((File::open(path).map_err(failed)?, kind.is_block_device()))
}

/// Size and alignment of a direct read that every block device takes.
const BLOCK: usize = 4096;

/// Reads the first block past the host's cache, which may have it from better times; through the cache where a file system has no direct I/O.
pub fn read_storage(path: &Path) -> io::Result<()> {
    let read = |flags| {
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let mut memory = vec![0; 2 * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        file.read_at(&mut memory[start..start + BLOCK], 0)
    };
    match read(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => read(0).map(drop),
        outcome => outcome.map(drop),
    }
}

/// As many bytes as there are, up to `length`.
fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// The backing file that the header of a qcow2 image names, and its format.
///
/// # Errors
/// It is no qcow2 image, or names what is refused.
pub fn backing_of(path: &Path) -> Result<Option<(String, Format)>, ImageError> {
    let (file, _) = open(path)?;
    backing(&file, path)
}

/// The size in bytes that a guest sees of an image.
///
/// # Errors
/// It cannot be opened or read, or is not of that format.
pub fn virtual_size(layer: &Layer) -> Result<u64, ImageError> {
    let path = Path::new(&layer.path);
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    let (mut file, _) = open(path)?;
    if layer.format == Format::Raw {
        // Of a block device the length of the file says nothing.
        return io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(failed);
    }
    let header = read_at(&file, 0, 32).map_err(failed)?;
    match header.get(24..32).and_then(|bytes| bytes.try_into().ok()).filter(|_| header.starts_with(MAGIC)) {
        Some(bytes) => Ok(u64::from_be_bytes(bytes)),
        None => Err(ImageError::NotQcow2 {
            path: path.to_owned(),
            reason: "it does not begin with QFI\\xfb".to_owned(),
        }),
    }
}

const MAGIC: &[u8] = b"QFI\xfb";
/// Header extension "backing file format name", from QEMU's docs/interop/qcow2.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// QEMU's own limit on the length of a backing file's name.
const MAX_NAME: u32 = 1023;

/// The backing file and its format, from the header.
fn backing(file: &File, path: &Path) -> Result<Option<(String, Format)>, ImageError> {
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    let not_qcow2 = |reason: &str| ImageError::NotQcow2 { path: path.to_owned(), reason: reason.to_owned() };
    let header = read_at(file, 0, 104).map_err(failed)?;
    if header.len() < 72 || &header[..4] != MAGIC {
        return Err(not_qcow2("it does not begin with QFI\\xfb"));
    }
    let u32_at = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let version = u32_at(4);
    let extensions = match version {
        2 => 72,
        3 if header.len() >= 104 => u64::from(u32_at(100)),
        _ => return Err(not_qcow2(&format!("version {version}; 2 and 3 are known"))),
    };
    let offset = u64::from(u32_at(8)) << 32 | u64::from(u32_at(12));
    let length = u32_at(16);
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_NAME {
        return Err(not_qcow2("its backing file's name is longer than 1023 bytes"));
    }
    let name = read_at(file, offset, length as usize).map_err(failed)?;
    let name = String::from_utf8(name).map_err(|_| not_qcow2("its backing file's name is not UTF-8"))?;
    let format = backing_format(file, extensions, offset).map_err(failed)?;
    let Some(format) = format else {
        return Err(ImageError::BackingFormat { path: path.to_owned(), backing: name });
    };
    let refused = |reason| ImageError::Backing { path: path.to_owned(), backing: name.clone(), reason };
    let format: Format = format.parse().map_err(|_| {
        refused("its format is neither raw nor qcow2; `qemu-img convert` makes it one of them")
    })?;
    if name.starts_with("json:") {
        return Err(refused("a `json:` name can open anything; rebase the image onto a plain path"));
    }
    let plain = name.strip_prefix("file:").unwrap_or(&name);
    let absolute = path.parent().unwrap_or(Path::new("/")).join(plain);
    Ok(Some((absolute.to_string_lossy().into_owned(), format)))
}

/// Walks the header extensions, which end with type 0 or where the name begins.
fn backing_format(file: &File, mut at: u64, end: u64) -> io::Result<Option<String>> {
    while at + 8 <= end {
        let head = read_at(file, at, 8)?;
        let Some((kind, length)) =
            head.split_first_chunk::<4>().and_then(|(k, rest)| Some((k, rest.first_chunk::<4>()?)))
        else {
            return Ok(None);
        };
        let (kind, length) = (u32::from_be_bytes(*kind), u32::from_be_bytes(*length));
        match kind {
            0 => return Ok(None),
            BACKING_FORMAT => {
                let text = read_at(file, at + 8, length.min(MAX_NAME) as usize)?;
                return Ok(String::from_utf8(text).ok());
            }
            _ => at += 8 + u64::from(length).next_multiple_of(8),
        }
    }
    Ok(None)
}
