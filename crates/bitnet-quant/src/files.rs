//! The files of a model: a folder on disk, or named bytes in memory.
//!
//! Opens files by plain names and bounds those that are read whole. Knows nothing of what is in
//! them.

use crate::error::{Error, Result};
use crate::mapping::{self, FileBytes};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// Where the files of one model are.
#[derive(Debug, Clone)]
pub struct ModelFiles(Source);

#[derive(Debug, Clone)]
enum Source {
    Folder(PathBuf),
    Memory { name: String, files: BTreeMap<String, Bytes> },
}

impl ModelFiles {
    /// The files of a folder; none is opened yet.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Source::Folder(path.into()))
    }

    /// Files in memory, shared and never copied: a model inside a program, or a test.
    pub fn in_memory<N: Into<String>>(
        name: impl Into<String>,
        files: impl IntoIterator<Item = (N, Bytes)>,
    ) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.into(), bytes)).collect();
        Self(Source::Memory { name: name.into(), files })
    }

    /// What the model is called for lack of a better name: its folder's.
    pub fn name(&self) -> String {
        match &self.0 {
            Source::Memory { name, .. } => name.clone(),
            Source::Folder(path) => {
                let full = path.canonicalize().unwrap_or_else(|_| path.clone());
                full.file_name().unwrap_or(full.as_os_str()).to_string_lossy().into_owned()
            }
        }
    }

    /// How messages name `file`.
    pub(crate) fn label(&self, file: &str) -> String {
        match &self.0 {
            Source::Memory { name, .. } => format!("{name}/{file}"),
            Source::Folder(path) => path.join(file).display().to_string(),
        }
    }

    /// How messages name the whole.
    pub(crate) fn place(&self) -> String {
        match &self.0 {
            Source::Memory { name, .. } => name.clone(),
            Source::Folder(path) => path.display().to_string(),
        }
    }

    /// Whether there is a file of this name.
    pub(crate) fn has(&self, file: &str) -> bool {
        match &self.0 {
            Source::Memory { files, .. } => files.contains_key(file),
            Source::Folder(path) => path.join(file).exists(),
        }
    }

    /// The bytes of a file, mapped where it is on disk; `None` if there is none of this name.
    pub(crate) fn map(&self, file: &str) -> Result<Option<FileBytes>> {
        match &self.0 {
            Source::Memory { files, .. } => Ok(files.get(file).cloned().map(FileBytes::from)),
            Source::Folder(path) => if_found(mapping::open_mapped(path.join(plain(file)?))),
        }
    }

    /// As [`ModelFiles::map`], read whole, for files of at most `limit` bytes.
    pub(crate) fn read(&self, file: &str, limit: u64) -> Result<Option<Bytes>> {
        let too_long = |len| {
            let error = Error::malformed("file length", format!("at most {limit} bytes"), len);
            Err(error.in_file(self.label(file)))
        };
        match &self.0 {
            Source::Memory { files, .. } => match files.get(file) {
                Some(bytes) if bytes.len() as u64 > limit => too_long(bytes.len() as u64),
                bytes => Ok(bytes.cloned()),
            },
            Source::Folder(folder) => {
                let path = folder.join(plain(file)?);
                match std::fs::metadata(&path) {
                    Ok(metadata) if metadata.is_file() && metadata.len() > limit => {
                        too_long(metadata.len())
                    }
                    _ => if_found(mapping::open_read(path)), // which says what is wrong, if anything
                }
            }
        }
    }

    /// Names of the files that end in `.suffix`, sorted.
    pub(crate) fn names_with(&self, suffix: &str) -> Result<Vec<String>> {
        match &self.0 {
            Source::Memory { files, .. } => {
                Ok(files.keys().filter(|name| has_suffix(name, suffix)).cloned().collect())
            }
            Source::Folder(path) => {
                let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, "list", e))?;
                let mut names = Vec::new();
                for entry in entries {
                    let entry = entry.map_err(|e| Error::io(path, "list", e))?;
                    names.extend(entry.file_name().into_string().ok());
                }
                names.retain(|name| has_suffix(name, suffix));
                names.sort();
                Ok(names)
            }
        }
    }
}

fn has_suffix(name: &str, suffix: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case(suffix))
}

/// A file of the folder itself: names inside model files must not lead anywhere else.
fn plain(file: &str) -> Result<&Path> {
    let path = Path::new(file);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) if name == path.as_os_str() => Ok(path),
        _ => Err(Error::malformed("file name", "the name of a file in the model's folder", file)),
    }
}

fn if_found<T>(opened: Result<T>) -> Result<Option<T>> {
    match opened {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_folder() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("secret"), b"x").unwrap();
        let inner = root.path().join("model");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("a.json"), b"{}").unwrap();
        let files = ModelFiles::folder(&inner);
        assert_eq!(files.read("a.json", 10).unwrap().as_deref(), Some(&b"{}"[..]));
        assert!(files.read("b.json", 10).unwrap().is_none());
        for name in ["../secret", "/etc/passwd", "x/../../secret", "", ".", "..", "./a.json"] {
            assert!(matches!(files.map(name), Err(Error::Malformed { .. })), "{name:?}");
            assert!(matches!(files.read(name, 10), Err(Error::Malformed { .. })), "{name:?}");
        }
    }

    #[test]
    fn long_files_are_refused_unread() {
        let files = ModelFiles::in_memory("m", [("a", Bytes::from_static(b"12345"))]);
        assert!(files.read("a", 5).unwrap().is_some());
        let message = files.read("a", 4).unwrap_err().to_string();
        assert_eq!(message, "m/a: file length: expected at most 4 bytes, got 5");
    }
}
