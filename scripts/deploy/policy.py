"""Rules for deploy/, docker-compose.yml and the Dockerfile that no linter knows: what may run how, and that names fit the code.

Called by check.sh: policy.py BASE.yaml PRODUCTION.yaml redis.acl (the former two as kustomize builds them).
"""

import pathlib
import re
import sys

import yaml

base_file, production_file, acl_file = sys.argv[1:]
faults = []
count = 0


def rule(holds, sentence):
    global count
    count += 1
    if not holds:
        faults.append(sentence)


def text(path):
    return pathlib.Path(path).read_text()


def compose():
    project = yaml.safe_load(text("docker-compose.yml"))
    rule("name" not in project and "version" not in project, "docker-compose.yml: no name, no version (1.29 and v2)")
    for name, service in project["services"].items():
        own = f"docker-compose.yml: {name}:"
        rule(service.get("read_only") is True, f"{own} the root is read-only")
        rule(service.get("cap_drop") == ["ALL"] and "cap_add" not in service, f"{own} no capability")
        rule("no-new-privileges:true" in service.get("security_opt", []), f"{own} no new privileges")
        rule("mem_limit" in service and "pids_limit" in service, f"{own} memory and processes are limited")
        rule(not service.get("privileged") and service.get("network_mode") != "host", f"{own} nothing of the host's")
        rule("restart" in service, f"{own} comes back by itself")
        rule(":latest" not in service["image"] and ":" in service["image"], f"{own} the image has a tag")
        for port in service.get("ports", []):
            rule(str(port).startswith("127.0.0.1:"), f"{own} port {port} is published on the loopback interface only")
        relay = service["image"].startswith("cyberscan-relay")
        rule(relay or "healthcheck" in service, f"{own} has a health check (the relay's is in its image)")
        # The relay's image has a user of its own.
        rule(relay or not service["user"].startswith(("0", "root")), f"{own} does not run as root")
        for variable, value in (service.get("environment") or {}).items():
            secret = re.search(r"TOKEN|PASSWORD|SECRET|ENCRYPTION_KEY|REDIS_URL", variable)
            rule(not secret or str(value).startswith("/run/secrets/"), f"{own} {variable} is the path of a file")
        for volume in service.get("volumes", []):
            rule("docker.sock" not in volume, f"{own} does not hold the engine")
            rule(not volume.startswith((".", "/")) or volume.endswith(":ro"), f"{own} {volume} is read-only")
        secrets = {**project["secrets"]}
        rule(all(secret in secrets for secret in service.get("secrets", [])), f"{own} its secrets are declared")
    services = project["services"]
    rule(project["networks"]["redis"].get("internal") is True, "docker-compose.yml: Redis has no way out")
    rule(services["redis"]["networks"] == ["redis"] and "ports" not in services["redis"], "docker-compose.yml: only relays reach Redis")
    rule(services["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false", "docker-compose.yml: nobody enters Grafana without a name")
    for name in ("relay-demo", "sandbox", "traffic"):
        rule(services[name].get("profiles") == ["demo"], f"docker-compose.yml: {name} is part of the demo only")
    demo = {key for key in services["relay-demo"]["environment"] if re.search("JWKS|HOSTS|CIDRS|EXTRA_CA", key)}
    rule(not demo & set(services["relay"]["environment"]), "docker-compose.yml: the relay believes nothing that the demo's believes")
    script = text("scripts/secrets.sh")
    for name, secret in project["secrets"].items():
        rule(secret["file"] == f"./deploy/secrets/{name}", f"docker-compose.yml: secret {name} is a file of that name")
        rule(f"make {name} " in script, f"scripts/secrets.sh makes {name}")


def kubernetes(path, name):
    documents = {document["kind"]: document for document in yaml.safe_load_all(text(path)) if document}
    own = f"{name}:"
    for kind in ("ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "ConfigMap"):
        rule(kind in documents, f"{own} there is a {kind}")
    rule("Secret" not in documents, f"{own} no Secret stands in the files")
    deployment = documents["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    rule("replicas" not in deployment, f"{own} the autoscaler owns the number of replicas")
    rule(pod["automountServiceAccountToken"] is False, f"{own} no token of the API")
    rule(documents["ServiceAccount"]["automountServiceAccountToken"] is False, f"{own} no token of the API, from the account either")
    rule(pod["enableServiceLinks"] is False, f"{own} no variables of other services, which could begin with RELAY_")
    rule(pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 65532, f"{own} not root")
    rule(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", f"{own} the runtime's seccomp profile")
    rule(not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), f"{own} nothing of the host's")
    rule({each["topologyKey"] for each in pod["topologySpreadConstraints"]} >= {"kubernetes.io/hostname", "topology.kubernetes.io/zone"},
         f"{own} spread over nodes and zones")
    for volume in pod.get("volumes", []):
        rule("hostPath" not in volume, f"{own} no path of the host")
    (container,) = pod["containers"]
    context = container["securityContext"]
    rule(context["readOnlyRootFilesystem"] is True, f"{own} the root is read-only")
    rule(context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}, f"{own} no capability, none to be had")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    rule(ports == {"http": 9090, "admin": 9091}, f"{own} the ports are the relay's")
    probes = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    rule(probes["livenessProbe"] == {"path": "/livez", "port": "admin"}, f"{own} alive: /livez of the admin listener")
    rule(probes["readinessProbe"] == {"path": "/readyz", "port": "admin"}, f"{own} ready: /readyz of the admin listener")
    rule("memory" in container["resources"]["limits"] and {"cpu", "memory"} <= set(container["resources"]["requests"]),
         f"{own} requests, and a limit of memory")
    rule(not container["image"].endswith(":latest") and ":" in container["image"], f"{own} the image has a tag")
    rule(not any("secretKeyRef" in str(variable) for variable in container.get("env", [])), f"{own} secrets are files")
    labels = deployment["template"]["metadata"]["labels"]
    for what, selector in (
        ("Deployment", deployment["selector"]["matchLabels"]),
        ("Service", documents["Service"]["spec"]["selector"]),
        ("PodDisruptionBudget", documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]),
        ("NetworkPolicy", documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]),
        *(("spread", each["labelSelector"]["matchLabels"]) for each in pod["topologySpreadConstraints"]),
    ):
        rule(selector and selector.items() <= labels.items(), f"{own} {what} selects the relay's pods")
    policy = documents["NetworkPolicy"]["spec"]
    rule(set(policy["policyTypes"]) == {"Ingress", "Egress"}, f"{own} the network is closed both ways")
    rule(all(each.get("from") and each.get("ports") for each in policy["ingress"]), f"{own} nobody comes in by default")
    rule(all(each.get("to") and each.get("ports") for each in policy["egress"]), f"{own} nothing goes out by default")
    rule({port["port"] for each in policy["egress"] for port in each["ports"]} == {53, 443, 6379}, f"{own} out: names, HTTPS, Redis")
    rule({port["port"] for each in policy["ingress"] for port in each["ports"]} == {9090, 9091}, f"{own} in: the relay's ports")
    for each in policy["egress"]:
        for peer in each["to"]:
            rule("app.kubernetes.io/name: cyberscan-relay" not in yaml.dump(peer), f"{own} the way out does not lead back")
            if "ipBlock" in peer and peer["ipBlock"]["cidr"] == "0.0.0.0/0":
                rule({"169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} <= set(peer["ipBlock"]["except"]),
                     f"{own} the way out leads to public addresses only")
    scaler = documents["HorizontalPodAutoscaler"]["spec"]
    settings = documents["ConfigMap"]["data"]
    rule(scaler["minReplicas"] >= 2, f"{own} never one replica alone")
    share = settings.get("RELAY_LIMITER_FALLBACK_SHARE")
    if name == "production":
        rule(scaler["minReplicas"] == 3, f"{own} three replicas")
        rule(float(share) * scaler["maxReplicas"] <= 1, f"{own} without Redis all replicas together keep to the quotas")
        rule("RELAY_AUTH_AUDIENCES" in settings, f"{own} the audience is set")
        rule(all("_FILE" in key for key in settings if re.search("TOKEN|REDIS_URL|ENCRYPTION", key)), f"{own} secrets are files")
        ingress = documents["Ingress"]["spec"]
        (entry,) = ingress["rules"]
        rule(f"https://{entry['host']}" == settings["RELAY_AUTH_AUDIENCES"], f"{own} the Ingress's host is the audience")
        rule(ingress["tls"] == [{"hosts": [entry["host"]], "secretName": "cyberscan-relay-tls"}], f"{own} the Ingress has a certificate")
        for path in entry["http"]["paths"]:
            service = path["backend"]["service"]
            rule(service["name"] == documents["Service"]["metadata"]["name"], f"{own} the Ingress leads to the Service")
            rule(service["port"] == {"name": "http"}, f"{own} the Ingress leads to the public listener only")
        nginx = {key.split("/")[1]: value for key, value in documents["Ingress"]["metadata"]["annotations"].items()}
        rule(int(nginx["proxy-read-timeout"]) > 35, f"{own} the Ingress waits for the longest answer")
        rule(nginx["proxy-http-version"] == "1.1", f"{own} the Ingress keeps its connections")
        rule(nginx["proxy-body-size"] == "2m", f"{own} bodies are the relay's to refuse")
        rule({"ServiceMonitor", "PrometheusRule"} <= set(documents), f"{own} watched by Prometheus")
        endpoint = documents["ServiceMonitor"]["spec"]
        rule(endpoint["selector"]["matchLabels"].items() <= documents["Service"]["metadata"]["labels"].items(),
             f"{own} the ServiceMonitor selects the Service")
        rule(endpoint["endpoints"][0]["port"] in {port["name"] for port in documents["Service"]["spec"]["ports"]},
             f"{own} the ServiceMonitor names one of its ports")
        for group in documents["PrometheusRule"]["spec"]["groups"] or []:
            rule(all("expr" in each and ("alert" in each or "record" in each) for each in group["rules"]), f"{own} group {group['name']}")
        mib = int(re.fullmatch(r"(\d+)MiB", settings["RELAY_CACHE_MEMORY"])[1])
        limit = int(re.fullmatch(r"(\d+)Mi", container["resources"]["limits"]["memory"])[1])
        rule(limit >= mib + 128, f"{own} the limit of memory leaves room above the cache")


def names():
    """What the deployments call things, the code has to know."""
    source = text("src/settings/keys.rs")
    # Each entry from its name to the end of its line or of the calls after it.
    entries = re.findall(r'^    \w+\(\s*"([a-z_.]+)",(.*?)(?=^    \w+\(|^\];)', source, re.M | re.S)
    variable = {key: "RELAY_" + key.upper().replace(".", "_") for key, _ in entries}
    rule(len(entries) > 50, f"settings/keys.rs: {len(entries)} keys were found")
    plain = set(variable.values())
    secret = {variable[key] for key, rest in entries if ".secret()" in rest}
    known = plain | secret | {name + "_FILE" for name in secret} | {"RELAY_CONFIG"}
    # Of the build, not of the relay.
    known |= {"RELAY_TAG", "RELAY_REVISION", "RELAY_VERSION", "RELAY_SOURCE", "RELAY_FEATURES"}
    files = ["docker-compose.yml", "Dockerfile", "deploy/relay.env", "docs/deploying.md", *pathlib.Path("deploy").rglob("*.yaml"),
             *pathlib.Path("deploy").rglob("*.service")]
    for file in files:
        for name in sorted(set(re.findall(r"\bRELAY_[A-Z][A-Z_]*[A-Z]\b", text(file)))):
            rule(name in known or name in ("RELAY_PORT", "RELAY_A_B"), f"{file}: {name} is a setting")

    version = re.search(r'^version = "(.*)"', text("Cargo.toml"), re.M)[1]
    rule(f"ARG RELAY_VERSION={version}\n" in text("Dockerfile"), f"Dockerfile: RELAY_VERSION is {version}")
    rule(f"image: cyberscan-relay:{version}\n" in text("deploy/kubernetes/base/deployment.yaml"), f"base: the image is {version}")
    rule(f"newTag: {version}\n" in text("deploy/kubernetes/overlays/production/kustomization.yaml"), f"production: the image is {version}")


def redis():
    """The relay's user may do what the relay does, on its keys."""
    users = {line.split()[1]: line.split()[2:] for line in text(acl_file).splitlines()}
    rule(users["default"] == ["reset"], "redis.acl: the default user is off")
    relay = users["relay"]
    rule([word for word in relay if word[0] in "~%"] == ["~relay:*"], "redis.acl: the relay reaches its keys only")
    rule("nopass" not in relay and "allkeys" not in relay and not any(word.startswith("+@") for word in relay),
         "redis.acl: single commands, with a password")
    allowed = {word[1:].split("|")[0] for word in relay if word.startswith("+")}
    sent = set()
    for file in pathlib.Path("src").rglob("*"):
        if file.suffix not in (".rs", ".lua") or file.name == "tests.rs":
            continue
        code = text(file)
        # What only tests send is at the end of a file.
        code = re.split(r"#\[cfg\(test\)\]", code)[0] if file.suffix == ".rs" else code
        # A script may have given `redis.call` a name of its own.
        sent |= set(re.findall(r"\bp?call\('([A-Z]+)'", code)) | set(re.findall(r'\bcmd\("([A-Z]+)"\)', code))
        for pair in re.findall(r'\("([A-Z]+)", "[-+]", "[-+]"\)', code):
            sent.add(pair)
    rule(len(sent) > 10, "the commands of the relay are found in its source")
    for command in sorted(sent):
        rule(command.lower() in allowed, f"redis.acl: the relay sends {command} and may not")
    # What the driver sends by itself, and doctor (INFO).
    for command in allowed - {command.lower() for command in sent} - {"ping", "unwatch", "evalsha", "script", "xrange", "xrevrange", "info"}:
        rule(False, f"redis.acl: the relay may {command} and never sends it")


compose()
kubernetes(base_file, "base")
kubernetes(production_file, "production")
names()
redis()
for fault in faults:
    print(f"FAILED   {fault}", file=sys.stderr)
if not faults:
    print(f"ok       {count} rules of scripts/deploy/policy.py")
sys.exit(1 if faults else 0)
