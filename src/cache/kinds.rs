//! The kinds of records that are kept, and what the stage has to know of each: what it is asked by, how long it is good,
//! what it weighs. It owns nothing else.

use std::{future::Future, net::IpAddr};

use serde::{Serialize, de::DeserializeOwned};

use super::{Config, policy::Policy};
use crate::{
    ctim::{DomainName, Subject},
    cyberscan::{
        Answer, Call, CyberScan, DomainRecord, Error, Finding, HostRecord, RecordType, Vulnerabilities,
    },
};

/// What the allocator adds to a text on the heap.
const BLOCK: usize = 16;

/// A kind of record that is kept.
pub(super) trait Kind: Serialize + DeserializeOwned + Send + Sync + Sized + 'static {
    const TYPE: RecordType;
    type Subject: Clone + ToString + Send + Sync + 'static;

    fn policy(config: &Config) -> &Policy;
    fn subject(subject: &Self::Subject) -> Subject;
    /// Where it leads, for a domain.
    fn address(&self) -> Option<IpAddr> {
        None
    }
    /// Bytes in memory, with what the allocator adds.
    fn weight(&self) -> usize;
    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        subject: &Self::Subject,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send;
}

impl Kind for DomainRecord {
    const TYPE: RecordType = RecordType::Domain;
    type Subject = DomainName;

    fn policy(config: &Config) -> &Policy {
        &config.domain
    }

    fn subject(subject: &DomainName) -> Subject {
        Subject::Domain(subject.clone())
    }

    fn address(&self) -> Option<IpAddr> {
        self.ip
    }

    fn weight(&self) -> usize {
        size_of::<Self>() + self.details_page.as_ref().map_or(0, |page| page.capacity() + BLOCK)
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        domain: &DomainName,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.domain(call, domain)
    }
}

impl Kind for HostRecord {
    const TYPE: RecordType = RecordType::Host;
    type Subject = IpAddr;

    fn policy(config: &Config) -> &Policy {
        &config.host
    }

    fn subject(subject: &IpAddr) -> Subject {
        Subject::Ip(*subject)
    }

    fn weight(&self) -> usize {
        size_of::<Self>() + self.details_page.as_ref().map_or(0, |page| page.capacity() + BLOCK)
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        ip: &IpAddr,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.host(call, *ip)
    }
}

impl Kind for Vulnerabilities {
    const TYPE: RecordType = RecordType::Vulnerabilities;
    type Subject = IpAddr;

    fn policy(config: &Config) -> &Policy {
        &config.vulnerabilities
    }

    fn subject(subject: &IpAddr) -> Subject {
        Subject::Ip(*subject)
    }

    fn weight(&self) -> usize {
        let string = |text: &String| size_of::<String>() + text.capacity() + BLOCK;
        // The text itself counts with the finding.
        let text = |text: &Option<String>| text.as_ref().map_or(0, |text| text.capacity() + BLOCK);
        let finding = |finding: &Finding| {
            let cells = finding.table.iter().map(|(name, value)| string(name) + string(value));
            let cves = finding.cves.iter().map(string);
            size_of_val(finding)
                + cells.sum::<usize>()
                + cves.sum::<usize>()
                + text(&finding.name)
                + text(&finding.description)
                + text(&finding.cve)
        };
        size_of::<Self>() + self.0.iter().map(finding).sum::<usize>()
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        ip: &IpAddr,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.vulnerabilities(call, *ip)
    }
}
