//! Where the settings of a running relay are read from, and read again. It owns the paths and whether their content has
//! changed; it must not know what is in them.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{self, Digest};

use super::{Faults, KEYS, Settings, values};

/// A file of settings and an environment; the files that variables name are read each time.
#[derive(Clone)]
pub struct Source {
    file: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl Source {
    /// The settings in `file`, if there is one, with `environment` over them.
    #[must_use]
    pub fn new(file: Option<PathBuf>, environment: Vec<(String, String)>) -> Self {
        // A variable that is there and empty names no file.
        Self { file: file.filter(|file| !file.as_os_str().is_empty()), environment }
    }

    /// Reads the settings.
    ///
    /// # Errors
    /// All [`Faults`] of the configuration.
    pub fn load(&self) -> Result<Settings, Faults> {
        Settings::load(self.file.as_deref(), self.environment.iter().cloned())
    }

    /// What tells whether any of the files has another content than before. What cannot be read has none.
    pub(crate) fn content(&self) -> Vec<Option<Vec<u8>>> {
        const MOST: u64 = 1 << 20;
        let secrets = self
            .environment
            .iter()
            .filter(|(name, _)| KEYS.iter().any(|key| key.secret && *name == key.variable() + "_FILE"));
        let secrets = secrets.map(|(_, path)| Path::new(values::bare(path)));
        let digest = |path: &Path| -> Option<Digest> {
            let text = values::file(path, MOST).ok()?;
            Some(digest::digest(&digest::SHA256, text.as_bytes()))
        };
        let files = self.file.as_deref().into_iter().chain(secrets);
        files.map(|path| digest(path).map(|digest| digest.as_ref().to_vec())).collect()
    }
}
