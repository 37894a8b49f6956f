//! Opens a model file as [`FileBytes`]: mapped, so that pages are read when used, or as `Bytes`,
//! read whole.
//!
//! Only regular, non-empty files are accepted. Knows nothing of what the bytes mean.

use crate::error::{Error, Result};
use bytes::Bytes;
use std::fs::{File, Metadata};
use std::io::Read;
use std::ops::{Deref, RangeBounds};
use std::path::Path;
use std::sync::Arc;

/// Bytes of a model: a part of a mapped file, or of memory. Clones and slices share them.
#[derive(Debug, Clone)]
pub struct FileBytes {
    bytes: Bytes,
    mapping: Option<Mapping>,
}

/// A file in memory, read-only.
#[derive(Debug, Clone)]
struct Mapping(Arc<memmap2::Mmap>);

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl FileBytes {
    /// A part of them; panics if the range does not lie inside.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        Self { bytes: self.bytes.slice(range), mapping: self.mapping.clone() }
    }

    /// The bytes as `Bytes`, shared.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Tells the system that these bytes will not be read for a while. Pages of a mapped file leave
    /// the process's memory, and come back from the file if they are read all the same; memory that
    /// belongs to no file stays.
    pub fn release(&self) {
        if let Some(mapping) = &self.mapping {
            release(&mapping.0, &self.bytes);
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Bytes> for FileBytes {
    fn from(bytes: Bytes) -> Self {
        Self { bytes, mapping: None }
    }
}

impl From<Vec<u8>> for FileBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

/// Maps a file into memory; nothing is read before it is used.
///
/// A file that shrinks while it is mapped makes the process stop with a bus error when a lost page
/// is read: use [`open_read`] for files that others may cut short.
pub fn open_mapped(path: impl AsRef<Path>) -> Result<FileBytes> {
    let path = path.as_ref();
    let (file, _) = open_regular(path)?;
    let mapping = map(&file).map_err(|error| Error::io(path, "map", error))?;
    let mapping = Mapping(Arc::new(mapping));
    Ok(FileBytes { bytes: Bytes::from_owner(mapping.clone()), mapping: Some(mapping) })
}

/// Reads a file into memory whole.
pub fn open_read(path: impl AsRef<Path>) -> Result<Bytes> {
    let path = path.as_ref();
    let (file, metadata) = open_regular(path)?;
    let too_large = || Error::io(path, "read", std::io::ErrorKind::OutOfMemory.into());
    let len = usize::try_from(metadata.len()).map_err(|_| too_large())?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| too_large())?;
    // The length is a promise of the file system, not of the file: what comes later is cut off.
    file.take(metadata.len())
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(path, "read", error))?;
    if bytes.len() != len {
        return Err(Error::malformed("file length", len, bytes.len()).in_file(path.display()));
    }
    Ok(bytes.into())
}

/// Opens a regular file with at least one byte. The kind is looked at before opening, as opening
/// a pipe would wait for its writer, and again after it, as the name may point elsewhere by then.
fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    check_regular(path, &std::fs::metadata(path).map_err(|error| Error::io(path, "open", error))?)?;
    let file = File::open(path).map_err(|error| Error::io(path, "open", error))?;
    let metadata = file.metadata().map_err(|error| Error::io(path, "open", error))?;
    check_regular(path, &metadata)?;
    Ok((file, metadata))
}

fn check_regular(path: &Path, metadata: &Metadata) -> Result<()> {
    let got = match () {
        () if metadata.is_dir() => "a folder",
        () if !metadata.is_file() => "a pipe, socket or device",
        () if metadata.len() == 0 => "an empty file",
        () => return Ok(()),
    };
    Err(Error::malformed("model file", "a regular file with data", got).in_file(path.display()))
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only and private to this process's view; `Bytes` hands it out
    // only as `&[u8]` and keeps it alive as long as any clone lives. What the language cannot rule
    // out is another process writing to the file meanwhile. Every reader in this crate treats the
    // bytes as untrusted: it checks lengths and codes, never reads outside the slice whatever the
    // bytes say, and makes no `str`, `bool` or enum from them without validating a copy. So a
    // concurrent change can yield wrong numbers, but no access outside the mapping. Shrinking the
    // file ends the process by signal, as the public documentation says.
    unsafe { memmap2::Mmap::map(file) }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn release(map: &memmap2::Mmap, part: &[u8]) {
    let offset = part.as_ptr().addr() - map.as_ptr().addr();
    // SAFETY: the advice makes pages lose what was written to them in memory only. Nothing was: the
    // mapping is read-only and backed by the file, so a page that is dropped here, a neighbour's
    // share of it included, has the same bytes when it is read again. References to it stay valid,
    // as the address range stays mapped. `part` is a slice of `map`, so the range lies inside.
    let advised = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, part.len())
    };
    // Advice that is not taken costs memory, nothing else.
    let _ = advised;
}

#[cfg(not(unix))]
fn release(_: &memmap2::Mmap, _: &[u8]) {
    // Windows drops pages of mapped files by itself when memory is short.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_give_the_bytes_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, b"trits").unwrap();
        assert_eq!(&open_mapped(&path).unwrap()[..], b"trits");
        assert_eq!(&open_read(&path).unwrap()[..], b"trits");
    }

    #[test]
    fn what_is_no_regular_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        let absent = folder.path().join("absent");
        for (path, reason) in
            [(folder.path(), "a folder"), (&empty, "an empty file"), (&absent, "cannot open")]
        {
            for opened in [open_mapped(path).map(drop), open_read(path).map(drop)] {
                let message = opened.unwrap_err().to_string();
                assert!(message.contains(reason), "{message}");
                assert!(message.starts_with(&path.display().to_string()), "{message}");
            }
        }
    }

    /// Bytes of the mapping at `address` that are in memory, as Linux tells.
    #[cfg(target_os = "linux")]
    fn resident(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let hex = |text| usize::from_str_radix(text, 16).ok();
            !range.is_some_and(|(start, end)| {
                hex(start).is_some_and(|start| start <= address)
                    && hex(end).is_some_and(|end| address < end)
            })
        });
        let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_leave_memory_and_come_back() {
        const LEN: usize = 8 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, vec![7; LEN]).unwrap();
        let bytes = open_mapped(&path).unwrap();
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        assert_eq!(sum(&bytes), 7 * LEN as u64);
        let address = bytes.as_ptr().addr();
        assert_eq!(resident(address), LEN);
        bytes.slice(LEN / 2..).release();
        assert_eq!(resident(address), LEN / 2);
        assert_eq!(sum(&bytes), 7 * LEN as u64);
        assert_eq!(resident(address), LEN);
    }

    #[test]
    fn memory_without_a_file_is_kept() {
        let bytes = FileBytes::from(vec![7; 1 << 20]);
        bytes.release();
        assert!(bytes.iter().all(|&byte| byte == 7));
    }

    #[cfg(unix)]
    #[test]
    fn devices_and_pipes_are_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&pipe, Path::new("/dev/zero")] {
            let message = open_mapped(path).unwrap_err().to_string();
            assert!(message.contains("a pipe, socket or device"), "{message}");
        }
    }
}
