//! Real files, of the file system that temporary files are on.

use super::*;

fn options(path: &Path) -> Options {
    Options {
        path: path.to_owned(),
        read_only: false,
        direct: false,
        unmap: true,
        write_through: false,
        size: 0,
    }
}

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(bytes).expect("it grows");
    file
}

fn open(options: Options) -> Storage {
    Storage::open(options).expect("it opens")
}

fn read(storage: &Storage, offset: u64, length: u32) -> Vec<u8> {
    match storage.perform(&Request::Read { offset, length }) {
        Ok(Reply::Data(data)) => data.to_vec(),
        other => panic!("{other:?}"),
    }
}

fn write(storage: &Storage, offset: u64, data: Vec<u8>) {
    let written =
        storage.perform(&Request::Write { offset, data: Bytes::from(&*data), fua: true }).expect("written");
    assert_eq!(written, Reply::Done);
}

#[test]
fn what_is_written_is_read_back_in_every_mode() {
    for (direct, write_through) in [(false, false), (false, true), (true, false)] {
        let file = image(1 << 20);
        let storage = open(Options { direct, write_through, ..options(file.path()) });
        let block = storage.features().min_block;
        assert_eq!(block > 1, direct);
        let data: Vec<u8> = (0..16 * block.max(512)).map(|n| n as u8).collect();
        write(&storage, u64::from(block), data.clone());
        assert_eq!(read(&storage, u64::from(block), data.len() as u32), data);
        assert_eq!(read(&storage, 0, block), vec![0; block as usize]);
        storage.perform(&Request::Flush).expect("flushed");
    }
}

#[test]
fn a_file_grows_up_to_the_size_that_was_given() {
    for direct in [false, true] {
        let file = image(4096);
        let storage = open(Options { size: 1 << 20, direct, ..options(file.path()) });
        assert_eq!(storage.size().expect("told"), 1 << 20);
        assert_eq!(read(&storage, 0, 1 << 20), vec![0; 1 << 20], "nothing there reads as zeros");
        let allocated = storage.perform(&Request::BlockStatus { offset: 4096, length: 8192 }).expect("told");
        assert_eq!(allocated, Reply::Extents(vec![Extent { length: 8192, hole: true, zero: true }]));
        write(&storage, 65536, vec![7; 4096]);
        assert_eq!(file.as_file().metadata().expect("it is there").len(), 65536 + 4096);
        assert_eq!(read(&storage, 65536, 8192), [vec![7; 4096], vec![0; 4096]].concat());
    }
}

#[test]
fn blocks_are_given_up_only_where_that_is_wanted() {
    use std::os::unix::fs::MetadataExt;
    let zeroes = |may_trim, only_fast| Request::WriteZeroes {
        offset: 0,
        length: 1 << 20,
        fua: false,
        may_trim,
        only_fast,
    };
    for (unmap, request, freed) in [
        (true, Request::Trim { offset: 0, length: 1 << 20, fua: true }, true),
        (true, zeroes(true, true), true),
        (true, zeroes(false, true), false),
        (false, zeroes(true, false), false),
    ] {
        let file = image(1 << 20);
        let storage = open(Options { unmap, ..options(file.path()) });
        write(&storage, 0, vec![7; 1 << 20]);
        storage.perform(&request).expect("done");
        assert_eq!(read(&storage, 0, 1 << 20), vec![0; 1 << 20], "{request:?}");
        let blocks = file.as_file().metadata().expect("it is there").blocks();
        assert_eq!(blocks < 1024, freed, "{request:?}: {blocks} blocks");
        assert_eq!(storage.features().trim, unmap);
    }
}

#[test]
fn what_is_allocated_is_told_in_order() {
    let file = image(1 << 20);
    let storage = open(options(file.path()));
    write(&storage, 256 << 10, vec![7; 64 << 10]);
    let extent = |length, hole| Extent { length, hole, zero: hole };
    let told = storage.perform(&Request::BlockStatus { offset: 0, length: 1 << 20 }).expect("told");
    let all = [extent(256 << 10, true), extent(64 << 10, false), extent(704 << 10, true)];
    assert_eq!(told, Reply::Extents(all.to_vec()));
    let told = storage.perform(&Request::BlockStatus { offset: 300 << 10, length: 1 << 10 }).expect("told");
    assert_eq!(told, Reply::Extents(vec![extent(1 << 10, false)]));
}

#[test]
fn what_cannot_be_served_is_refused() {
    let missing = Storage::open(options(Path::new("/nonexistent/image"))).expect_err("missing");
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    let folder = tempfile::tempdir().expect("a folder");
    let folder = Storage::open(Options { read_only: true, ..options(folder.path()) }).expect_err("a folder");
    assert!(folder.to_string().contains("neither"), "{folder}");
    let odd = image(1000);
    let odd = Storage::open(Options { direct: true, ..options(odd.path()) }).expect_err("an odd size");
    assert!(odd.to_string().contains("leave --direct out"), "{odd}");
}
