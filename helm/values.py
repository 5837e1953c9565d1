"""The values of the chart, as types: `values.schema.json` is made from them. Their meaning stands in `values.yaml`.

What `config` and `pools.*.config` may say comes from `cluster.config` itself: see `helm.schema`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
NameOrNone = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Resource = Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]
DataKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
Interval = Annotated[str, Field(pattern=r"^[1-9][0-9]*(ms|s|m)$")]
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
LabelMap = dict[str, str]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Percent = Annotated[int, Field(ge=1, le=100)]
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")]


ITEM: Final = "x-item"  # taken out again by helm.schema


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Item(Section):
    """An element of a list: whole, or wrong, as no default of the chart stands behind it."""

    model_config = ConfigDict(json_schema_extra={ITEM: True})


class Image(Section):
    repository: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._/:-]*$")]
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]
    pullSecrets: list[Name]


class Variable(Item):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str


class ModelClaim(Section):
    existingClaim: NameOrNone
    subPath: str


class ModelInit(Section):
    enabled: bool
    image: str
    command: list[str]
    env: list[Variable]
    sizeLimit: Quantity


class Model(Section):
    path: AbsolutePath
    pvc: ModelClaim
    init: ModelInit


class Toleration(Item):
    key: str = ""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""] = ""


class NodeRule(Item):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class Spread(Item):
    topologyKey: str
    maxSkew: Positive
    whenUnsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]


class Devices(Section):
    resource: Resource
    count: Count


class Pod(Section):
    cpu: Quantity
    memory: Quantity
    gpu: Devices
    rdma: Devices
    sharedMemory: Quantity
    nodeSelector: LabelMap
    tolerations: list[Toleration]
    nodeAffinity: list[NodeRule]
    oncePer: str
    spread: list[Spread]
    networks: str
    hostNetwork: bool
    priorityClassName: NameOrNone
    runtimeClassName: NameOrNone
    annotations: LabelMap
    env: list[Variable]


class Head(Section):
    cpu: Quantity
    memory: Quantity
    nodeSelector: LabelMap
    tolerations: list[Toleration]
    priorityClassName: NameOrNone


class PoolConfigPlace(Section):
    """Replaced by the schema of `cluster.config.PoolConfig`."""


class ConfigPlace(Section):
    """Replaced by the schema of `cluster.config.SluiceConfig`, less what the chart says itself."""


class PodOverride(Section):
    """Replaced by the schema of `Pod`, in which every key may be left out."""


class Pool(Section):
    config: PoolConfigPlace
    pods: Count
    maxPods: Positive
    pod: PodOverride


class ClusterSecret(Section):
    existingSecret: NameOrNone
    key: DataKey
    value: str


class WordsTls(Section):
    existingSecret: NameOrNone
    serverName: str


class ApiKeys(Section):
    existingSecret: NameOrNone
    key: DataKey
    lines: list[str]


class Ray(Section):
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")]
    authentication: Literal["token", "disabled"]


class LiveProbe(Section):
    periodSeconds: Positive
    failureThreshold: Positive
    stalledSeconds: Positive


class ReadyProbe(Section):
    periodSeconds: Positive
    failureThreshold: Positive


class StartProbe(Section):
    failureThreshold: Positive


class Probes(Section):
    start: StartProbe
    live: LiveProbe
    ready: ReadyProbe


class Drain(Section):
    marginSeconds: Annotated[int, Field(ge=10)]


class Toggle(Section):
    enabled: bool


class NetworkPolicy(Section):
    enabled: bool
    operatorNamespace: Name
    clientNamespaces: list[Name]
    scraperNamespaces: list[Name]
    collectorNamespaces: list[Name]
    collectorPort: Annotated[int, Field(ge=0, le=65535)]
    egressCidrs: list[Cidr]


class SecretKey(Section):
    name: NameOrNone
    key: DataKey


class ScrapeConfig(Section):
    enabled: bool
    interval: Interval
    labels: LabelMap
    apiKey: SecretKey


class PodMonitor(Section):
    enabled: bool
    interval: Interval
    labels: LabelMap


class Labelled(Section):
    enabled: bool
    labels: LabelMap


class Rules(Section):
    enabled: bool
    labels: LabelMap
    runbookUrl: Annotated[str, Field(pattern=r"^https?://")]


class Monitoring(Section):
    scrapeConfig: ScrapeConfig
    podMonitor: PodMonitor
    rules: Rules
    dashboards: Labelled


class Tls(Section):
    enabled: bool
    existingSecret: NameOrNone
    certificate: str
    key: str


class Ingress(Section):
    enabled: bool
    className: NameOrNone
    host: str
    path: Annotated[str, Field(pattern=r"^/")]
    annotations: LabelMap
    tls: Tls


class ParentRef(Item):
    name: Name
    namespace: NameOrNone = ""
    sectionName: NameOrNone = ""


class HttpRoute(Section):
    enabled: bool
    parentRefs: list[ParentRef]
    hostnames: list[str]


class Autoscaling(Section):
    enabled: bool
    idleTimeoutSeconds: Positive
    upscalingMode: Literal["Default", "Conservative"]


class GcsFaultTolerance(Section):
    enabled: bool
    redisAddress: Annotated[str, Field(pattern=r"^(rediss?://)?[A-Za-z0-9.-]+:[0-9]+$")]
    passwordSecret: SecretKey
    storageNamespace: str


class Upgrade(Section):
    strategy: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]
    gatewayClassName: NameOrNone
    stepSizePercent: Percent
    intervalSeconds: Positive
    maxSurgePercent: Percent
    clusterDeletionDelaySeconds: Count


class Values(Section):
    nameOverride: Annotated[str, Field(pattern=r"^([a-z]([a-z0-9-]{0,38}[a-z0-9])?)?$")]
    labels: LabelMap
    image: Image
    ray: Ray
    config: ConfigPlace
    configDelivery: Literal["inline", "file"]
    model: Model
    pools: dict[PoolName, Pool]
    pod: Pod
    head: Head
    clusterSecret: ClusterSecret
    wordsTls: WordsTls
    apiKeys: ApiKeys
    probes: Probes
    drain: Drain
    podDisruptionBudget: Toggle
    networkPolicy: NetworkPolicy
    monitoring: Monitoring
    ingress: Ingress
    httpRoute: HttpRoute
    autoscaling: Autoscaling
    gcsFaultTolerance: GcsFaultTolerance
    upgrade: Upgrade
