//! `cyberscan-relay module-type`: prints the document, writes it to a file, or registers it. It owns the options and what
//! is shown; it must not know what the platform's answers mean.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{
    Audience, ModuleType, Region, RelayUrl,
    platform::{Action, Client, GRANT, Id, Platform, Stored, TOKEN},
    prompt::{self, PromptError},
};
use crate::egress::{self, Host, Http};

/// More than an id or a password has.
const CREDENTIAL: u64 = 4096;

/// The options of the command.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// The region of your SecureX/XDR; its platform signs the tokens.
    #[arg(long, value_enum, ignore_case = true, required_unless_present = "platform_host")]
    region: Option<Region>,
    /// The relay's public URL.
    #[arg(long, help = "The relay's public URL, as the platform calls it: https://relay.example.com")]
    url: RelayUrl,
    /// What tokens are made for, where that is not the URL.
    #[arg(long, value_name = "TEXT")]
    audience: Option<Audience>,
    /// Write the document to this file.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Register the document with the platform, as a new module type.
    #[arg(long)]
    register: bool,
    /// Make the module type with this ID what the document says, instead of registering a new one.
    #[arg(long, value_name = "ID")]
    update: Option<Id>,
    /// Show the calls that would be made, without secrets; make none.
    #[arg(long)]
    dry_run: bool,
    /// Where the API client's id is; without it, it is asked for.
    #[arg(long, value_name = "FILE")]
    client_id_file: Option<PathBuf>,
    /// Where the API client's password is; without it, it is asked for and not shown.
    #[arg(long, value_name = "FILE")]
    client_password_file: Option<PathBuf>,
    /// Call this host instead of the region's. Without --region it also signs the tokens.
    #[arg(long, value_name = "HOST")]
    platform_host: Option<Host>,
}

impl Options {
    /// What is to be done at the platform, if anything is.
    fn action(&self) -> Option<Action> {
        match &self.update {
            Some(id) => Some(Action::Update(id.clone())),
            None => (self.register || self.dry_run).then_some(Action::Create),
        }
    }

    fn module_type(&self) -> anyhow::Result<ModuleType> {
        let region = self.region.map(|region| region.host().to_owned());
        let jwks_host = region.or_else(|| self.platform_host.as_ref().map(Host::to_string));
        Ok(ModuleType {
            url: self.url.clone(),
            audience: self.audience.clone(),
            jwks_host: jwks_host.context("--region is missing")?,
        })
    }
}

/// Does what `options` say. Calls go the way that `egress` says, which is read only if there are any.
///
/// # Errors
/// When a file cannot be read or written, nobody answers, or the platform refuses.
pub async fn run(
    options: &Options,
    egress: impl FnOnce() -> anyhow::Result<egress::Config>,
) -> anyhow::Result<()> {
    let module_type = options.module_type()?;
    let document = pretty(&module_type.document());
    if let Some(file) = &options.output {
        std::fs::write(file, &document)
            .with_context(|| format!("--output: cannot write {}", file.display()))?;
    }
    let Some(action) = options.action() else {
        ensure!(
            options.client_id_file.is_none() && options.client_password_file.is_none(),
            "a client's id or password is needed with --register, --update or --dry-run only"
        );
        match &options.output {
            None => say(&document)?,
            Some(file) => note(&format!("The module type is in {}.\n", file.display()))?,
        }
        return note(&needs(&module_type));
    };
    let host = match &options.platform_host {
        Some(host) => host.clone(),
        None => module_type.jwks_host.parse()?,
    };
    if options.dry_run {
        // Files that cannot be used are found; nobody is asked for what is not needed.
        for (what, file) in [("id", &options.client_id_file), ("password", &options.client_password_file)] {
            file.as_deref().map(|file| read(what, file)).transpose()?;
        }
        return say(&calls(&host, &action, &module_type));
    }
    // Before anybody types a password.
    let http = Http::new(&egress()?)?;
    let client = client(options, &host).await?;
    let stored =
        Platform { http: &http, host: &host, client: &client }.register(&action, &module_type).await?;
    say(&outcome(&host, &action, &stored))?;
    note(&needs(&module_type))
}

/// A document as it stands in a file.
pub(super) fn pretty(document: &Value) -> String {
    format!("{document:#}\n")
}

/// The calls of `action`, for people to look at: no secret is in them.
fn calls(host: &Host, action: &Action, module_type: &ModuleType) -> String {
    format!(
        "POST https://{host}{TOKEN}\nAuthorization: Basic <client id and password>\n\
         Content-Type: application/x-www-form-urlencoded\n\n{GRANT}\n\n\
         {} https://{host}{}\nAuthorization: Bearer <the token of the first answer>\nContent-Type: application/json\n\n{}",
        action.method(),
        action.path(),
        pretty(&action.body(module_type))
    )
}

/// What the command says when the platform has done it.
pub(crate) fn outcome(host: &Host, action: &Action, stored: &Stored) -> String {
    let id = &stored.id;
    let mut text = match action {
        Action::Create => format!(
            "Registered at {host} as module type {id}. Keep the ID: --update {id} changes it.\n\
             Now add an integration of it in SecureX/XDR; its form asks for the CyberScan host and API key.\n"
        ),
        Action::Update(_) => format!("Module type {id} at {host} is up to date.\n"),
    };
    if !stored.differs.is_empty() {
        text += &format!(
            "The platform has kept other values than were sent of: {}.\n",
            stored.differs.join(", ")
        );
    }
    text
}

/// What has to be set elsewhere for such tokens to be accepted.
fn needs(module_type: &ModuleType) -> String {
    let audience = Value::from(module_type.audience());
    let mut text = format!(
        "The relay has to be set to it: auth.audiences = [{audience}], and {} in auth.jwks_hosts",
        module_type.jwks_host
    );
    let default = Region::ALL.iter().any(|region| region.host() == module_type.jwks_host);
    text += if default { " (where it is by default).\n" } else { ".\n" };
    if let Some(path) = module_type.url.path() {
        text += &format!("The relay's routes are at the root: the proxy in front has to take {path} off.\n");
    }
    text
}

async fn client(options: &Options, host: &Host) -> anyhow::Result<Client> {
    let id = match &options.client_id_file {
        Some(file) => read("id", file)?,
        None => prompt::ask(&format!("Id of the API client at {host}: ")).await.map_err(unasked("id"))?,
    };
    let password = match &options.client_password_file {
        Some(file) => read("password", file)?,
        None => prompt::ask_hidden("Its password (not shown): ").await.map_err(unasked("password"))?,
    };
    Ok(Client::new(id.expose_secret(), &password)?)
}

fn unasked(what: &str) -> impl FnOnce(PromptError) -> anyhow::Error {
    let advice = format!("the client's {what} is missing; --client-{what}-file FILE reads it");
    move |error| match error {
        PromptError::Interrupted => error.into(),
        error => anyhow::Error::new(error).context(advice),
    }
}

/// What is in a credential's file.
fn read(what: &str, file: &Path) -> anyhow::Result<SecretString> {
    let option = || format!("--client-{what}-file: {}", file.display());
    let open = std::fs::File::open(file).with_context(option)?;
    let text = io::read_to_string(io::Read::take(open, CREDENTIAL + 1)).with_context(option)?;
    let text = SecretString::from(text);
    let length = text.expose_secret().len() as u64;
    ensure!(length <= CREDENTIAL, "{}: more than {CREDENTIAL} bytes", option());
    ensure!(!text.expose_secret().trim().is_empty(), "{}: empty", option());
    Ok(text)
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Beside the document, which may be all that standard output is to hold.
fn note(text: &str) -> anyhow::Result<()> {
    Ok(io::stderr().write_all(text.as_bytes())?)
}
