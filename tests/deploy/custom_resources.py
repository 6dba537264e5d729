"""What the controllers of other projects ask of the objects that the chart makes for them.

Their own definitions are thousands of lines, and nobody installs them here. These say what the chart may use of them
and nothing else, so that a misspelt field, which a cluster would refuse or drop, does not pass.
"""

from typing import Any

__all__ = ["SCHEMAS"]

Schema = dict[str, Any]

STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
COUNT_OR_SHARE = {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"}
STRINGS = {"type": "object", "additionalProperties": STRING}
# looked into by the validator of Kubernetes' own objects
POD_TEMPLATE = {"type": "object", "required": ["metadata", "spec"]}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = _object({"name": STRING, "labels": STRINGS}, {"annotations": STRINGS})
    return _object({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


POD_MONITOR = _resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    _object(
        {
            "jobLabel": STRING,
            "podTargetLabels": _list(STRING),
            "selector": _object({"matchLabels": STRINGS}),
            "podMetricsEndpoints": _list(_object({"port": STRING, "path": STRING, "interval": DURATION})),
        }
    ),
)

_RECORDED = _object({"record": STRING, "expr": STRING}, {"labels": STRINGS})
_ALERT = _object(
    {"alert": STRING, "expr": STRING, "labels": STRINGS, "annotations": STRINGS},
    {"for": DURATION, "keep_firing_for": DURATION},
)
PROMETHEUS_RULE = _resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    _object(
        {
            "groups": _list(
                _object({"name": STRING, "rules": _list({"anyOf": [_RECORDED, _ALERT]})}, {"interval": DURATION})
            )
        }
    ),
)

SCALED_OBJECT = _resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    _object(
        {
            "scaleTargetRef": _object({"apiVersion": STRING, "kind": STRING, "name": STRING}),
            "minReplicaCount": COUNT,
            "maxReplicaCount": COUNT,
            "pollingInterval": COUNT,
            "advanced": _object(
                {
                    "horizontalPodAutoscalerConfig": _object(
                        {
                            "behavior": _object(
                                {
                                    "scaleDown": _object(
                                        {
                                            "stabilizationWindowSeconds": COUNT,
                                            "policies": _list(
                                                _object({"type": STRING, "value": COUNT, "periodSeconds": COUNT})
                                            ),
                                        }
                                    )
                                }
                            )
                        }
                    )
                }
            ),
            "triggers": _list(
                _object(
                    {
                        "type": {"const": "prometheus"},
                        "metricType": {"enum": ["AverageValue", "Value"]},
                        # KEDA takes strings alone
                        "metadata": _object({"serverAddress": STRING, "query": STRING, "threshold": STRING}),
                    }
                )
            ),
        }
    ),
)

LEADER_WORKER_SET = _resource(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    _object(
        {
            # LeaderReady would wait for a leader that waits for its workers
            "startupPolicy": {"const": "LeaderCreated"},
            "rolloutStrategy": _object(
                {
                    "type": {"const": "RollingUpdate"},
                    "rollingUpdateConfiguration": _object(
                        {"maxUnavailable": COUNT_OR_SHARE, "maxSurge": COUNT_OR_SHARE}
                    ),
                }
            ),
            "leaderWorkerTemplate": _object(
                {
                    "size": {"type": "integer", "minimum": 2},
                    "restartPolicy": {"const": "RecreateGroupOnPodRestart"},
                    "leaderTemplate": POD_TEMPLATE,
                    "workerTemplate": POD_TEMPLATE,
                }
            ),
        },
        {"replicas": COUNT},
    ),
)

SCHEMAS = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (POD_MONITOR, PROMETHEUS_RULE, SCALED_OBJECT, LEADER_WORKER_SET)
}
