//! Why a request is not authorized. It must not know the words that are sent.

use crate::metrics::Verdict;

/// The first check a request failed, in the order they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum AuthError {
    #[error("there is no Authorization header")]
    MissingHeader,
    #[error("the Authorization header is not `Bearer <token>`")]
    WrongScheme,
    #[error("the token is not an RS256-signed JWT in its strict form")]
    Malformed,
    #[error("the payload names no key issuer")]
    MissingIssuer,
    #[error("the key issuer is not on the allow-list or does not answer with a key set")]
    WrongIssuer,
    #[error("the key issuer has no usable key of that id")]
    UnknownKey,
    #[error("the signature is wrong")]
    WrongSignature,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not yet valid")]
    NotYetValid,
    #[error("the token is for another audience")]
    WrongAudience,
    #[error("the payload lacks an API key or a host")]
    MissingClaims,
}

impl AuthError {
    /// What it is called where it is counted.
    pub(crate) fn verdict(self) -> Verdict {
        match self {
            Self::MissingHeader => Verdict::MissingHeader,
            Self::WrongScheme => Verdict::WrongScheme,
            Self::Malformed => Verdict::Malformed,
            Self::MissingIssuer => Verdict::MissingIssuer,
            Self::WrongIssuer => Verdict::WrongIssuer,
            Self::UnknownKey => Verdict::UnknownKey,
            Self::WrongSignature => Verdict::WrongSignature,
            Self::Expired => Verdict::Expired,
            Self::NotYetValid => Verdict::NotYetValid,
            Self::WrongAudience => Verdict::WrongAudience,
            Self::MissingClaims => Verdict::MissingClaims,
        }
    }
}
