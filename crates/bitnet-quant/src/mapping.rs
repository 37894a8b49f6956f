//! Opens a model file as [`Bytes`]: mapped, so that pages are read when used, or read whole.
//!
//! Only regular, non-empty files are accepted. Knows nothing of what the bytes mean.

use crate::error::{Error, Result};
use bytes::Bytes;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

/// Maps a file into memory; nothing is read before it is used.
///
/// A file that shrinks while it is mapped makes the process stop with a bus error when a lost page
/// is read: use [`open_read`] for files that others may cut short.
pub fn open_mapped(path: impl AsRef<Path>) -> Result<Bytes> {
    let path = path.as_ref();
    let (file, _) = open_regular(path)?;
    let map = map(&file).map_err(|error| Error::io(path, "map", error))?;
    Ok(Bytes::from_owner(map))
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
            for opened in [open_mapped(path), open_read(path)] {
                let message = opened.unwrap_err().to_string();
                assert!(message.contains(reason), "{message}");
                assert!(message.starts_with(&path.display().to_string()), "{message}");
            }
        }
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
