//! Files that appear under their names only when they are complete.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Bytes collected before the system is asked to write.
const BUFFER: usize = 1 << 20;

/// A file being written beside its final place; dropped before [`NewFile::commit`], it vanishes.
pub struct NewFile {
    temporary: PathBuf,
    path: PathBuf,
    file: Option<BufWriter<File>>,
}

impl NewFile {
    /// Starts the file `path`; one that exists is in the way unless `replace`.
    ///
    /// # Errors
    /// A file in the way, a folder that cannot be written to.
    pub fn create(path: &Path, replace: bool) -> Result<Self> {
        if !replace && path.symlink_metadata().is_ok() {
            return Err(Error::Exists(path.to_owned()));
        }
        let Some(name) = path.file_name().filter(|_| !path.is_dir()) else {
            return Err(Error::malformed("output", "the name of a file", path.display()));
        };
        // In a container every process has the same number, so that one which was killed may have
        // left a file of this name: the next number is free.
        let mut number = 0_u64;
        let (temporary, file) = loop {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{number}.part", std::process::id()));
            let temporary = path.with_file_name(hidden);
            match OpenOptions::new().write(true).create_new(true).open(&temporary) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                file => break (temporary, file.map_err(|e| Error::io(path, "create", e))?),
            }
        };
        let file = Some(BufWriter::with_capacity(BUFFER, file));
        Ok(Self { temporary, path: path.to_owned(), file })
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where bytes go.
    pub fn writer(&mut self) -> &mut impl Write {
        self.file.as_mut().expect("taken only by `commit`, which ends the value")
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.writer().write_all(bytes);
        written.map_err(|e| Error::io(&self.path, "write", e))
    }

    /// Brings the file to the disk and gives it its name.
    ///
    /// # Errors
    /// A full disk, a name that a folder has.
    pub fn commit(mut self) -> Result<()> {
        let file = self.file.take().expect("present until here");
        let file = file.into_inner().map_err(|e| Error::io(&self.path, "write", e.into_error()))?;
        file.sync_all().map_err(|e| Error::io(&self.path, "write", e))?;
        drop(file);
        std::fs::rename(&self.temporary, &self.path)
            .map_err(|e| Error::io(&self.path, "create", e))?;
        self.temporary.clear();
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            drop(self.file.take());
            // Nothing more can be done if even this fails.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let mut file = NewFile::create(&path, false).unwrap();
        file.write(b"abc").unwrap();
        assert!(!path.exists());
        drop(file);
        assert_eq!(names(), 0, "a file given up leaves nothing");
        let mut file = NewFile::create(&path, false).unwrap();
        file.write(b"abc").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert!(matches!(NewFile::create(&path, false), Err(Error::Exists(p)) if p == path));
        NewFile::create(&path, true).unwrap().commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert_eq!(names(), 1);
        assert!(NewFile::create(folder.path(), true).is_err(), "a folder is no file");
    }

    #[test]
    fn what_a_killed_process_left_behind_is_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        std::mem::forget(NewFile::create(&path, false).unwrap());
        let mut file = NewFile::create(&path, false).unwrap();
        file.write(b"abc").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
    }
}
