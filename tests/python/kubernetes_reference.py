"""Checks Kubernetes manifests against the published schemas, and against the compose file.

usage: kubernetes_reference.py MANIFESTS COMPOSE_FILE

Prints one line for each manifest. Ends with 1, and says what differs, where they are
not the same system.
"""

import re
import sys

import kubernetes_validate
import yaml

# The oldest release that clusters are likely to have, and the newest with schemas.
RELEASES = ("1.30", "1.37")


def main(manifests_path, compose_path):
    with open(manifests_path) as file:
        manifests = [document for document in yaml.safe_load_all(file) if document]
    with open(compose_path) as file:
        services = yaml.safe_load(file)["services"]
    for manifest in manifests:
        for release in RELEASES:
            kubernetes_validate.validate(manifest, release, strict=True)
        print(f"{manifest['kind']} {manifest['metadata']['name']}: valid in {', '.join(RELEASES)}")

    found = {(m["kind"], m["metadata"]["name"]): m["spec"] for m in manifests}
    service = found["Service", "coordinator"]
    coordinator = found["Job", "drift-coordinator"]
    worker = found["Job", "drift-worker"]
    for kind, spec, name in (
        ("coordinator", coordinator, "coordinator"),
        ("worker", worker, "worker-gpu-0"),
    ):
        same_program(kind, spec["template"]["spec"], services[name])

    labels = coordinator["template"]["metadata"]["labels"]
    same("the Service selects the coordinator", service["selector"].items() <= labels.items(), True)
    environment = variables(coordinator["template"]["spec"])
    same("the Service's name", environment["DRIFT__LAUNCH__ADVERTISE"], "coordinator")
    listens = {port["name"]: port["port"] for port in service["ports"]}
    same("the Service's gRPC port", listens["grpc"], int(environment["DRIFT__LAUNCH__LISTEN"].split(":")[1]))
    same("it finds a coordinator that waits", service["publishNotReadyAddresses"], True)
    same("completions", worker["completions"], int(environment["DRIFT__WORKERS"]))
    same("parallelism", worker["parallelism"], worker["completions"])
    same("completion mode", worker["completionMode"], "Indexed")
    claims = {name for kind, name in found if kind == "PersistentVolumeClaim"}
    for spec in (coordinator, worker):
        volumes = {v["name"]: v for v in spec["template"]["spec"]["volumes"]}
        named = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        same("claims", named <= claims, True)
        for mount in spec["template"]["spec"]["containers"][0]["volumeMounts"]:
            same(f"the volume of {mount['mountPath']}", mount["name"] in volumes, True)


def same_program(kind, pod, service):
    """One container as compose and as Kubernetes start it."""
    container = pod["containers"][0]
    same(f"{kind}'s image", container["image"], defaults(service["image"]))
    # What each run sets for itself.
    own = ("--config=", "--slot=", "--threads=")
    arguments = [a for a in container["args"] if not a.startswith(own)]
    theirs = [defaults(a) for a in service["command"]]
    same(f"{kind}'s arguments", arguments, [a for a in theirs if not a.startswith(own)])
    own = ("DRIFT__WORKERS", "DRIFT__LAUNCH__THREADS")
    theirs = {k: defaults(v) for k, v in service.get("environment", {}).items()}
    same(f"{kind}'s variables", without(variables(pod), own), without(theirs, own))

    port = int(next(a for a in arguments if a.startswith("--metrics=")).rsplit(":", 1)[1])
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    same(f"{kind}'s metrics port", ports["metrics"], port)
    same(f"{kind}'s health check", service["healthcheck"]["test"][-1], f"{port}/healthz")
    same(f"{kind}'s liveness", container["livenessProbe"]["httpGet"], {"path": "/healthz", "port": "metrics"})
    same(f"{kind}'s readiness", container["readinessProbe"]["httpGet"], {"path": "/readyz", "port": "metrics"})

    # Corpora may lie on any volume; compose has a folder for them.
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    theirs = (defaults(volume).split(":") for volume in service["volumes"])
    theirs = {v[1]: v[2:] == ["ro"] for v in theirs if v[1] != "/data"} | {t.split(":")[0]: False for t in service["tmpfs"]}
    same(f"{kind}'s mounts", without(mounts, ("/dev/shm",)), theirs)
    user = pod["securityContext"]
    same(f"{kind}'s user", f"{user['runAsUser']}:{user['runAsGroup']}", service["user"])
    same(f"{kind}'s root", container["securityContext"]["readOnlyRootFilesystem"], service["read_only"])
    same(f"{kind}'s grace", f"{pod['terminationGracePeriodSeconds'] // 60}m", service["stop_grace_period"])


def variables(pod):
    return {v["name"]: v["value"] for v in pod["containers"][0].get("env", [])}


def without(mapping, names):
    return {name: value for name, value in mapping.items() if name not in names}


def defaults(text):
    """Text with each `${NAME:-DEFAULT}` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def same(what, ours, theirs):
    if ours != theirs:
        sys.exit(f"{what}: {ours} in Kubernetes, {theirs} in compose or by the manifests' own logic")


main(*sys.argv[1:])
