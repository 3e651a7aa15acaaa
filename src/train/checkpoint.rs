//! The files that a run writes by itself, at steps, epochs, improvements and its end, and the older ones that go for them: the disk's side
//! of [`super::keep`].

use super::keep::{file_name, Kept, Kind, Moment, Part, Saving};
use super::metadata::SESSION;
use super::network::{train, Network};
use crate::adapter::safetensors::File;
use crate::error::{Error, FileFault, Result};
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What [`Network::checkpoint`] did on the disk.
#[derive(Debug, Default)]
pub struct Files {
    /// New files, complete.
    pub written: Vec<PathBuf>,
    /// Older files of this run that were put out of date.
    pub deleted: Vec<PathBuf>,
    /// Files that should be deleted but were left, and why.
    pub left: Vec<(PathBuf, String)>,
}

impl Network {
    /// Writes the files that are due at this moment, then deletes those that they put out of date. `value` is what the run wants small, a
    /// validation loss; NaN where there is none.
    ///
    /// A file that cannot be written is an error: older files stay, and training can go on. Only files that this run wrote are deleted.
    pub fn checkpoint(&mut self, moment: Moment, value: f64) -> Result<Files> {
        self.built()?;
        if moment == Moment::Epoch {
            self.run.epoch += 1;
        }
        let saving = self.config.saving.clone();
        let (Some(dir), Some(name)) = (&saving.dir, self.config.output_name.clone()) else {
            return match moment {
                Moment::End => Err(train(
                    "nothing says where the adapter goes",
                    "set output_dir and output_name, or call save",
                )),
                _ => Ok(Files::default()),
            };
        };
        let dir = Path::new(dir);
        let mut files = Files::default();
        // What a killed process did not come to, so that a resumed run has the same list again.
        self.delete_outdated(&saving, dir, &mut files);
        self.steps = self.settled_steps()?;
        for kind in saving.due(moment, self.steps, self.micro == 0, value, &self.run) {
            std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
            for part in saving.parts() {
                let file = file_name(&name, kind, part);
                let path = dir.join(&file);
                // A state tells of itself and of the adapters beside it.
                let before = self.run.clone();
                match kind {
                    Kind::Step(_) | Kind::Epoch(_) => {
                        self.run.note(Kept { file, kind, state: part == Part::State })
                    }
                    Kind::Best => self.run.best = Some(value),
                    Kind::Final => {}
                }
                let (precision, ema) = (saving.precision, self.config.ema_decay.is_some());
                let written = match part {
                    Part::Adapter => self.save(&path, precision, &BTreeMap::new(), ema),
                    Part::Ranks(rank) => self.save_prefix(rank, &path, precision, ema),
                    Part::State => self.save_state(&path),
                };
                if let Err(error) = written {
                    self.run = before;
                    return Err(error);
                }
                files.written.push(path);
            }
        }
        self.delete_outdated(&saving, dir, &mut files);
        Ok(files)
    }

    /// Ends of epochs so far.
    pub fn epochs(&self) -> u64 {
        self.run.epoch
    }

    fn delete_outdated(&mut self, saving: &Saving, dir: &Path, files: &mut Files) {
        for old in saving.outdated(&self.run.files) {
            let path = dir.join(&old.file);
            match self.delete_own(&path) {
                Ok(true) => files.deleted.push(path),
                Ok(false) => {}
                Err(Left::Foreign) => {
                    files.left.push((path, "is not the file that this run wrote there".into()))
                }
                Err(Left::Failed(why)) => {
                    files.left.push((path, why));
                    // Tried again the next time.
                    continue;
                }
            }
            self.run.files.retain(|kept| *kept != old);
        }
    }

    /// Deletes a file of this run; false when there is none.
    fn delete_own(&self, path: &Path) -> std::result::Result<bool, Left> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(Error::File { fault: FileFault::Io(e), .. }) if e.kind() == ErrorKind::NotFound => {
                return Ok(false)
            }
            Err(Error::File { fault: FileFault::Io(e), .. }) => return Err(Left::Failed(e.to_string())),
            Err(_) => return Err(Left::Foreign),
        };
        if file.metadata().get(SESSION) != Some(&self.session.id) {
            return Err(Left::Foreign);
        }
        // Windows deletes no open file.
        drop(file);
        std::fs::remove_file(path).map(|()| true).map_err(|e| Left::Failed(e.to_string()))
    }

    /// [`Network::checkpoint`]'s files as JSON, with the counts that they stand for.
    pub fn report(&self, files: &Files) -> Value {
        let paths = |paths: &[PathBuf]| paths.iter().map(|p| json!(p.to_string_lossy())).collect::<Vec<_>>();
        let left =
            files.left.iter().map(|(path, why)| json!({"file": path.to_string_lossy(), "reason": why}));
        json!({
            "step": self.steps,
            "epoch": self.run.epoch,
            "best": self.run.best,
            "written": paths(&files.written),
            "deleted": paths(&files.deleted),
            "left": left.collect::<Vec<_>>(),
        })
    }
}

/// Why a file was not deleted.
enum Left {
    /// Somebody else wrote it.
    Foreign,
    /// The system's word.
    Failed(String),
}
