//! Files that appear whole or not at all.
//!
//! A save that is interrupted must leave the old file, and a save over a file that is mapped (an adapter that is saved
//! over itself) must not pull the bytes away from under its reader. Both come from writing a sibling and renaming it:
//! a rename never touches the old file's content, which lives on for as long as somebody has it open or mapped.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// Large enough that small tensors cost few system calls; larger writes go straight through.
const BUFFER: usize = 1 << 18;

/// A file that is being written beside its final place. [`commit`](AtomicFile::commit) puts it there in one step;
/// dropped without it, it vanishes and the old file, if any, stays as it was.
///
/// An existing file passes its permissions on, but not its owner or hard links. A symbolic link stays a link: the file
/// that it points to is replaced. Only a killed process leaves the sibling (`.lycore-<process>-<number>.tmp`) behind.
#[derive(Debug)]
pub struct AtomicFile {
    /// `None` once the handle is closed, on commit or drop.
    file: Option<BufWriter<File>>,
    /// Where the bytes are now.
    temp: PathBuf,
    /// Where they will be.
    target: PathBuf,
}

impl AtomicFile {
    /// Starts a file that will be `path`. Everything that can be known to make the commit fail fails here, before the
    /// caller computes what to write.
    pub fn create(path: &Path) -> Result<Self> {
        Self::create_beside(path).map_err(|e| Error::io(path, e))
    }

    fn create_beside(path: &Path) -> io::Result<Self> {
        let target = match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_symlink() => fs::canonicalize(path)?,
            _ => path.to_owned(),
        };
        let existing = match fs::metadata(&target) {
            Ok(meta) if meta.is_dir() => return Err(io::Error::new(ErrorKind::IsADirectory, "is a folder")),
            // A rename would replace a device or a pipe instead of writing into it.
            Ok(meta) if !meta.is_file() => return Err(not_regular()),
            Ok(meta) => Some(meta),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        if target.file_name().is_none() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "names no file"));
        }
        let (temp, file) = create_unique(folder_of(&target), existing.as_ref())?;
        // From here on the drop removes the sibling, whatever happens.
        let this = AtomicFile { file: Some(BufWriter::with_capacity(BUFFER, file)), temp, target };
        #[cfg(unix)]
        if let (Some(existing), Some(file)) = (existing, &this.file) {
            // The umask may have taken bits away. Only then: some file systems know no permissions and refuse.
            let file = file.get_ref();
            if file.metadata()?.permissions() != existing.permissions() {
                file.set_permissions(existing.permissions())?;
            }
        }
        Ok(this)
    }

    /// Makes the bytes durable and puts the file in its place. On an error before the rename the old file stays. The
    /// only error after it is one of flushing the folder: then the new file is in place, but a power cut may undo it.
    pub fn commit(mut self) -> Result<()> {
        let target = self.target.clone();
        self.publish().map_err(|e| Error::io(&target, e))
    }

    fn publish(&mut self) -> io::Result<()> {
        let Some(buffer) = self.file.as_mut() else { return Ok(()) };
        buffer.flush()?;
        buffer.get_ref().sync_all()?;
        self.close();
        if let Err(e) = fs::rename(&self.temp, &self.target) {
            let _ = fs::remove_file(&self.temp);
            return Err(e);
        }
        sync_folder(folder_of(&self.target))
    }

    /// Closes the handle without flushing. Windows neither renames nor removes an open file.
    fn close(&mut self) {
        if let Some(buffer) = self.file.take() {
            drop(buffer.into_parts());
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), BufWriter::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.close();
            let _ = fs::remove_file(&self.temp);
        }
    }
}

/// The fault of a path that is there but is neither file nor folder.
pub(super) fn not_regular() -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, "is not a regular file")
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Creates a new file in `folder`. Its name is short, so that every legal target name has a legal sibling. The process
/// id alone does not make it unique (containers that share a volume count alike), so a taken name is skipped.
fn create_unique(folder: &Path, existing: Option<&fs::Metadata>) -> io::Result<(PathBuf, File)> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if let Some(meta) = existing {
        use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
        // From the first moment nobody may open the new file who may not open the old one.
        options.mode(meta.permissions().mode() & 0o777);
    }
    #[cfg(not(unix))]
    let _ = existing;
    loop {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let temp = folder.join(format!(".lycore-{}-{call}.tmp", process::id()));
        match options.open(&temp) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            result => return result.map(|file| (temp, file)),
        }
    }
}

/// Makes the rename durable.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|f| f.sync_all()) {
        // A folder that may be written but not read, or a file system that cannot flush folders: nothing more to do.
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn save(path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = AtomicFile::create(path)?;
        file.write_all(bytes).unwrap();
        file.commit()
    }

    #[test]
    fn commit_replaces_and_drop_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        save(&path, b"old").unwrap();
        for size in [3, 2 * BUFFER] {
            let mut file = AtomicFile::create(&path).unwrap();
            file.write_all(&vec![b'x'; size]).unwrap();
            assert_eq!(names(folder.path()).len(), 2, "the sibling is there while it is written");
            assert_eq!(fs::read(&path).unwrap(), b"old");
            drop(file);
            assert_eq!(names(folder.path()), ["a"]);
            assert_eq!(fs::read(&path).unwrap(), b"old");
        }
        save(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn a_failed_rename_leaves_no_sibling() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"x").unwrap();
        fs::create_dir_all(path.join("in the way")).unwrap();
        let error = file.commit().unwrap_err();
        assert_eq!(error.file(), Some(path.as_path()));
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn threads_on_one_path_leave_one_whole_version() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        thread::scope(|scope| {
            for id in 0..8u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..5 {
                        let mut file = AtomicFile::create(path).unwrap();
                        (0..100).for_each(|_| file.write_all(&[id; 1000]).unwrap());
                        file.commit().unwrap();
                        let seen = fs::read(path).unwrap();
                        assert_eq!(seen.len(), 100_000);
                        assert!(seen.iter().all(|b| *b == seen[0]), "two versions mixed");
                    }
                });
            }
        });
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn what_cannot_become_a_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |path: &Path| match AtomicFile::create(path).unwrap_err() {
            Error::File { fault: crate::error::FileFault::Io(e), .. } => e.kind(),
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(folder.path()), ErrorKind::IsADirectory);
        assert_eq!(kind(Path::new("")), ErrorKind::InvalidInput);
        assert_eq!(kind(&folder.path().join("no such folder/a")), ErrorKind::NotFound);
        #[cfg(unix)]
        assert_eq!(kind(Path::new("/dev/null")), ErrorKind::InvalidInput);
        assert!(names(folder.path()).is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn permissions_of_the_old_file_are_kept() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, plain) = (folder.path().join("a"), folder.path().join("plain"));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        fs::write(&plain, b"").unwrap();
        save(&path, b"1").unwrap();
        assert_eq!(mode(&path), mode(&plain), "a new file follows the umask");
        // 0o666 has bits that the usual umask takes away, 0o600 lacks bits that it leaves.
        for wanted in [0o600, 0o666, 0o440] {
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            let file = AtomicFile::create(&path).unwrap();
            assert_eq!(mode(&file.temp), wanted, "while it is written, too");
            file.commit().unwrap();
            assert_eq!(mode(&path), wanted);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_symbolic_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        fs::write(&real, b"old").unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        save(&link, b"new").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["link", "real"]);
    }
}
