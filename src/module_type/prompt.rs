//! Owns a question on the terminal, also one whose answer is not shown. Must not know what is asked.

use std::io::{self, BufRead, IsTerminal, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use secrecy::{SecretString, zeroize::Zeroizing};
use tokio::sync::oneshot;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum PromptError {
    /// Nobody is there to answer.
    #[error("standard input is no terminal to ask on")]
    NoTerminal,
    /// Ctrl-C, or the end of the input.
    #[error("interrupted")]
    Interrupted,
    /// The terminal does not work.
    #[error("terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// Asks `question`; the answer is shown while it is typed.
///
/// # Errors
/// As [`PromptError`] says.
pub(super) async fn ask(question: &str) -> Result<SecretString, PromptError> {
    exchange(question).await
}

/// Asks `question`; the answer is not shown, not even its length.
///
/// # Errors
/// As [`PromptError`] says.
pub(super) async fn ask_hidden(question: &str) -> Result<SecretString, PromptError> {
    if !io::stdin().is_terminal() {
        return Err(PromptError::NoTerminal);
    }
    let silence = Silence::keep()?;
    let answer = exchange(question).await;
    drop(silence);
    // The line break that ended the answer was not shown, either.
    let _ = writeln!(io::stderr());
    answer
}

async fn exchange(question: &str) -> Result<SecretString, PromptError> {
    if !io::stdin().is_terminal() {
        return Err(PromptError::NoTerminal);
    }
    // Standard output may be a file that gets the document.
    let mut out = io::stderr();
    out.write_all(question.as_bytes())?;
    out.flush()?;
    // A thread of its own, which nobody waits for: after Ctrl-C it still sits there reading.
    let (send, answer) = oneshot::channel();
    std::thread::spawn(move || {
        let mut line = Zeroizing::new(String::new());
        let read = io::stdin().lock().read_line(&mut line).map(|read| (read > 0).then_some(line));
        let _ = send.send(read);
    });
    let answered = tokio::select! {
        answered = answer => answered.unwrap_or(Ok(None))?,
        _ = tokio::signal::ctrl_c() => None,
    };
    let line = answered.ok_or(PromptError::Interrupted)?;
    Ok(SecretString::from(line.trim_end_matches(['\r', '\n'])))
}

/// The terminal shows nothing of what is typed until this is dropped.
struct Silence {
    before: Termios,
}

impl Silence {
    fn keep() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        // What was typed ahead of the question is no answer to it.
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self { before })
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
