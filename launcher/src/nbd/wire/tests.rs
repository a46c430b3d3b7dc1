//! Each kind of request and of reply, byte by byte.

use super::*;

const FEATURES: Features = Features {
    read_only: false,
    flush: true,
    trim: true,
    write_zeroes: true,
    fast_zero: true,
    block_status: true,
    min_block: 512,
    preferred_block: 4096,
};

fn head(command: u16, flags: u16, offset: u64, length: u32) -> RequestHead {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(0x1122_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    let bytes = bytes.try_into().expect("the size of a head");
    RequestHead::parse(&bytes).expect("a head")
}

#[test]
fn requests_are_what_their_bytes_say() {
    let request = |command, flags| head(command, flags, 512, 1024).request(Bytes::from(&[7; 3][..]));
    assert_eq!(request(0, 0), Some(Request::Read { offset: 512, length: 1024 }));
    assert_eq!(
        request(1, FUA),
        Some(Request::Write { offset: 512, data: Bytes::from(&[7; 3][..]), fua: true })
    );
    assert_eq!(request(2, 0), None);
    assert_eq!(request(3, 0), Some(Request::Flush));
    assert_eq!(request(4, 0), Some(Request::Trim { offset: 512, length: 1024, fua: false }));
    let zeroes = |fua, may_trim, only_fast| {
        Some(Request::WriteZeroes { offset: 512, length: 1024, fua, may_trim, only_fast })
    };
    assert_eq!(request(6, 0), zeroes(false, true, false));
    assert_eq!(request(6, FUA | NO_HOLE | FAST_ZERO), zeroes(true, false, true));
    assert_eq!(request(7, 0), Some(Request::BlockStatus { offset: 512, length: 1024 }));
    assert!(RequestHead::parse(&[0; RequestHead::SIZE]).is_none());
}

#[test]
fn what_was_not_offered_is_refused() {
    let bare = Features { flush: false, trim: false, block_status: false, ..FEATURES };
    for command in [3, 4, 7] {
        assert_eq!(head(command, 0, 0, 512).check(4096, bare), Err(Errno::Invalid), "command {command}");
        assert_eq!(head(command, 0, 0, 512).check(4096, FEATURES), Ok(()), "command {command}");
    }
    let fixed = Features { read_only: true, ..FEATURES };
    for (command, outcome) in [(0, Ok(())), (1, Err(Errno::Perm)), (6, Err(Errno::Perm)), (3, Ok(()))] {
        assert_eq!(head(command, 0, 0, 512).check(4096, fixed), outcome, "command {command}");
    }
    assert_eq!(
        head(0, FAST_ZERO, 0, 512).check(4096, FEATURES),
        Err(Errno::Invalid),
        "a flag of another command"
    );
    assert_eq!(head(0, 0, 1, 512).check(4096, FEATURES), Err(Errno::Invalid), "an odd offset");
    assert_eq!(head(4, 0, 0, !511).check(1 << 33, FEATURES), Ok(()), "no memory, no limit");
    assert_eq!(FEATURES.flags(), 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 11);
}

#[test]
fn replies_are_simple_or_a_chunk() {
    let read = head(0, 0, 512, 2);
    let (bytes, data) = read.reply(false, 0, Ok(Reply::Data(Bytes::from(&[1, 2][..]))));
    assert_eq!(
        (bytes.as_slice(), &*data),
        (&b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\x11\x22"[..], &[1, 2][..])
    );
    let (bytes, data) = read.reply(true, 0, Ok(Reply::Data(Bytes::from(&[1, 2][..]))));
    let chunk = b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\x11\x22\0\0\0\x0a\0\0\0\0\0\0\x02\0";
    assert_eq!((bytes.as_slice(), &*data), (&chunk[..], &[1, 2][..]));
    let (bytes, _) = read.reply(true, 0, Ok(Reply::Data(Bytes::from(&[0][..]))));
    assert_eq!(bytes[6..8], *b"\x80\x01", "too short, so an error");
    let (bytes, _) = read.reply(true, 0, Err(Errno::Io));
    assert_eq!(bytes[4..], *b"\0\x01\x80\x01\0\0\0\0\0\0\x11\x22\0\0\0\x06\0\0\0\x05\0\0");
    let extents = vec![
        Extent { length: 4096, hole: true, zero: true },
        Extent { length: 512, hole: false, zero: false },
    ];
    let (bytes, data) = head(7, 0, 0, 1024).reply(true, 1, Ok(Reply::Extents(extents.clone())));
    assert_eq!(bytes[16..], *b"\0\0\0\x14\0\0\0\x01");
    assert_eq!(*data, *b"\0\0\x10\0\0\0\0\x03\0\0\x02\0\0\0\0\0");
    let (_, data) = head(7, REQ_ONE, 0, 1024).reply(true, 1, Ok(Reply::Extents(extents)));
    assert_eq!(*data, *b"\0\0\x04\0\0\0\0\x03", "one, and no longer than asked");
}
